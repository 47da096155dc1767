"""One new token per sequence through a decoder layer and the head, for capture.

The functions take tensors as arguments, without a layer's number or a cache, so one compiled function serves all
layers. The modules are `transformers`' own, in every storage format, and the sums are those of its forward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen_vram.runtime.attention import decode_step
from qwen_vram.runtime.attention.decode import decode_attention, paged_attention, quantized_attention
from qwen_vram.runtime.attention.decode_step import States
from qwen_vram.runtime.kernels import fused_ops
from qwen_vram.runtime.kv_cache.quantized import QuantizedStates
from qwen_vram.runtime.linear.step_products import add_mlp, add_product, products


class Place(NamedTuple):
    """Position of a step's tokens, on the device.

    Attributes:
        cos, sin: Cosines and sines of the rotary embedding, (batch, 1, head_dim).
        slots: Rows of a layer's memory for the new keys and values, (batch,).
        rows, starts, filled: As for `attention.decode`, with the new token.
        scratch: Memory of the kernels of `attention.decode_step`; `None` if they do not run.
        quantized: Number of tokens of a quantized cache that are codes, (1,) in int32.
        pages: Numbers of each sequence's pages, (batch, pages) in int32, if the memory is that of a page pool.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    rows: Tensor
    starts: Tensor
    filled: Tensor
    scratch: Tensor | None
    quantized: Tensor
    pages: Tensor | None = None


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
    attended = _over(_rotated(query, place), keys, values, place, float(attention.scaling))
    hidden = hidden + attention.o_proj(attended.view(batch, -1))
    result: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return result


def fused_decode_layer(layer: Any, hidden: Tensor, keys: States, values: States, place: Place) -> Tensor:
    """Return the result of `decode_layer` by this library's kernels, for `kernels="fused"` without compilation."""
    attention, batch = layer.self_attn, hidden.shape[0]
    normed = layer.input_layernorm(hidden)
    query, key, value = products((attention.q_proj, attention.k_proj, attention.v_proj), normed)
    query, key, value = (heads.view(batch, -1, attention.head_dim) for heads in (query, key, value))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    attended = attend(query, key, value, keys, values, place, float(attention.scaling))
    hidden = add_product(attention.o_proj, attended.view(batch, -1), hidden)
    return add_mlp(layer.mlp, layer.post_attention_layernorm(hidden), hidden)


def fused_decode_end(model: Any, hidden: Tensor) -> Tensor:
    """Return the result of `decode_end`, by this library's products."""
    return products((model.lm_head,), model.model.norm(hidden))[0].float()


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: States, values: States, place: Place, scale: float
) -> Tensor:
    """Rotate a token's heads, (batch, heads, head_dim), put keys and values into the memory, and return attention."""
    where = place.starts, place.filled
    if place.scratch is not None:
        tables = place.cos, place.sin
        return decode_step.attend(
            query, key, value, tables, keys, values, *where, place.scratch, scale, place.quantized, place.pages
        )
    query, key = query[:, None], key[:, None]
    fused_ops.rotate(query, key, place.cos, place.sin)
    if isinstance(keys, QuantizedStates):
        assert isinstance(values, QuantizedStates)
        return quantized_attention(query[:, 0], key[:, 0], value, keys, values, *where, scale, place.quantized)
    assert not isinstance(values, QuantizedStates)
    keys.index_copy_(0, place.slots, key[:, 0])
    values.index_copy_(0, place.slots, value)
    return _over(query[:, 0], keys, values, place, scale)


def _over(query: Tensor, keys: Tensor, values: Tensor, place: Place, scale: float) -> Tensor:
    """Return attention of rotated queries, (batch, heads, head_dim), over memory that holds the new keys and values."""
    if place.pages is not None:
        return paged_attention(query, keys, values, place.pages, place.filled, scale)
    result: Tensor = decode_attention(query, keys, values, place.rows, place.starts, place.filled, scale)
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
