"""One new token of every sequence through a decoder layer and through the model's end: what is captured or compiled.

Nothing here knows a layer's number or a cache: tensors are arguments, so that one compiled function serves all layers.
The modules are `transformers`' own, whatever their matrices are stored in; sums are those of its forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen_vram.runtime.attention.decode import decode_attention
from qwen_vram.runtime.kernels import fused_ops
from qwen_vram.runtime.linear import few_rows


class Place(NamedTuple):
    """Where a step's tokens are, on the device.

    Attributes:
        cos, sin: Of the rotary embedding, (batch, 1, head_dim).
        slots: Where keys and values go, (batch,): rows of a layer's memory.
        rows, starts, filled: As for `attention.decode`, the new token included.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    rows: Tensor
    starts: Tensor
    filled: Tensor


def decode_layer(layer: Any, hidden: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """One decoder layer: (batch, hidden_size) to the same; puts its keys and values into the memory."""
    attention, batch = layer.self_attn, hidden.shape[0]
    normed = layer.input_layernorm(hidden)
    query = _product(attention.q_proj, normed).view(batch, -1, attention.head_dim)
    key = _product(attention.k_proj, normed).view(batch, -1, attention.head_dim)
    value = _product(attention.v_proj, normed).view(batch, -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    keys.index_copy_(0, place.slots, _rotated(key, place))
    values.index_copy_(0, place.slots, value)
    attended = decode_attention(
        _rotated(query, place), keys, values, place.rows, place.starts, place.filled, float(attention.scaling)
    )
    hidden = hidden + attention.o_proj(attended.view(batch, -1))
    result: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return result


def fused_decode_layer(layer: Any, hidden: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """As `decode_layer`, by this library's own kernels: for layers with `kernels="fused"`, and not to be compiled."""
    attention, batch = layer.self_attn, hidden.shape[0]
    normed = layer.input_layernorm(hidden)
    query, key, value = _products((attention.q_proj, attention.k_proj, attention.v_proj), normed)
    query, key = (heads.view(batch, 1, -1, attention.head_dim) for heads in (query, key))
    value = value.view(batch, -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    fused_ops.rotate(query, key, place.cos, place.sin)
    keys.index_copy_(0, place.slots, key[:, 0])
    values.index_copy_(0, place.slots, value)
    attended = decode_attention(
        query[:, 0], keys, values, place.rows, place.starts, place.filled, float(attention.scaling)
    )
    hidden = _products((attention.o_proj,), attended.view(batch, -1))[0].add_(hidden)
    return _mlp(layer.mlp, layer.post_attention_layernorm(hidden)).add_(hidden)


def fused_decode_end(model: Any, hidden: Tensor) -> Tensor:
    """As `decode_end`, with the product of few rows."""
    return _products((model.lm_head,), model.model.norm(hidden))[0].float()


def _products(linears: tuple[nn.Module, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """The products of some matrices with the same rows: in one launch where that can be."""
    return few_rows.multiply_each(linears, rows) or tuple(linear(rows) for linear in linears)


def _mlp(mlp: Any, rows: Tensor) -> Tensor:
    """SwiGLU and what follows it; a whole call of the module where its matrices are not this library's to multiply."""
    inner = few_rows.swiglu(mlp.gate_proj, mlp.up_proj, rows)
    result: Tensor = mlp(rows) if inner is None else _products((mlp.down_proj,), inner)[0]
    return result


def decode_end(model: Any, hidden: Tensor) -> Tensor:
    """The last norm and the head: (batch, hidden_size) to logits (batch, vocab_size) in float32."""
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits.float()


def _product(linear: nn.Module, rows: Tensor) -> Tensor:
    """A matrix product. For one row the bias comes after it: torch's compiler leaves a sum of both to cuBLAS."""
    if type(linear) is nn.Linear and linear.bias is not None and len(rows) == 1:
        return functional.linear(rows, linear.weight) + linear.bias
    result: Tensor = linear(rows)
    return result


def _rotated(heads: Tensor, place: Place) -> Tensor:
    """Rotary embedding of (batch, heads, head_dim)."""
    left, right = heads.chunk(2, dim=-1)
    return heads * place.cos + torch.cat((-right, left), dim=-1) * place.sin
