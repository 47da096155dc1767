"""One new token per sequence through a decoder layer and the head, for capture.

The functions take tensors as arguments, without a layer's number or a cache, so one compiled function serves all
layers. The modules are `transformers`' own, in every storage format, and the sums are those of its forward pass.
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
    """Position of a step's tokens, on the device.

    Attributes:
        cos, sin: Cosines and sines of the rotary embedding, (batch, 1, head_dim).
        slots: Rows of a layer's memory for the new keys and values, (batch,).
        rows, starts, filled: As for `attention.decode`, with the new token.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    rows: Tensor
    starts: Tensor
    filled: Tensor


def decode_layer(layer: Any, hidden: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """Return a decoder layer's result, (batch, hidden_size) to the same; store its keys and values in the memory."""
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
    """Return the result of `decode_layer` by this library's kernels, for `kernels="fused"` without compilation."""
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
    """Return the result of `decode_end`, with this library's product of few rows."""
    return _products((model.lm_head,), model.model.norm(hidden))[0].float()


def _products(linears: tuple[nn.Module, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Return the products of some matrices with the same rows, in one launch if possible."""
    return few_rows.multiply_each(linears, rows) or tuple(linear(rows) for linear in linears)


def _mlp(mlp: Any, rows: Tensor) -> Tensor:
    """Return SwiGLU and the down projection, or the module's own result if our kernels cannot read its matrices."""
    inner = few_rows.swiglu(mlp.gate_proj, mlp.up_proj, rows)
    result: Tensor = mlp(rows) if inner is None else _products((mlp.down_proj,), inner)[0]
    return result


def decode_end(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits (batch, vocab_size) in float32 of (batch, hidden_size), by the last norm and the head."""
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits.float()


def _product(linear: nn.Module, rows: Tensor) -> Tensor:
    """Return a matrix product. For one row the bias is added after it: torch would leave a fused sum to cuBLAS."""
    if type(linear) is nn.Linear and linear.bias is not None and len(rows) == 1:
        return functional.linear(rows, linear.weight) + linear.bias
    result: Tensor = linear(rows)
    return result


def _rotated(heads: Tensor, place: Place) -> Tensor:
    """Return the rotary embedding of (batch, heads, head_dim)."""
    left, right = heads.chunk(2, dim=-1)
    return heads * place.cos + torch.cat((-right, left), dim=-1) * place.sin
