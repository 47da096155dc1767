"""Attention of captured decode steps, if the kernels of `decode_kernels` apply to a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_vram.arithmetic.attention import decode_scratch, decode_splits
from qwen_vram.runtime.kernels.fused_layers import FusedLayer
from qwen_vram.runtime.kernels.fused_ops import kernels_on


def scratch_elements(model: Any, batch_size: int, context_len: int) -> int:
    """Return the elements in float32 that the kernels need for any layer; 0 if they do not apply to the model."""
    layers = model.model.layers
    fused = all(isinstance(layer, FusedLayer) for layer in layers)
    if not fused or model.dtype not in (torch.bfloat16, torch.float16) or kernels_on(model.device) is None:
        return 0
    return max(_elements(layer.self_attn, batch_size, context_len) for layer in layers)


def _elements(attention: Any, batch_size: int, context_len: int) -> int:
    heads, kv_heads = (
        projection.out_features // attention.head_dim for projection in (attention.q_proj, attention.k_proj)
    )
    return decode_scratch(batch_size, heads, kv_heads, attention.head_dim, context_len)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    filled: Tensor,
    scratch: Tensor,
    scale: float,
) -> Tensor:
    """Return attention of a token per sequence, (batch, heads, head_dim), after it is written into the cache.

    Args:
        query, key, value: (batch, heads, head_dim), not rotated.
        tables: Cosines and sines, (batch, 1, head_dim).
        keys, values, starts, filled: As for `decode.decode_attention`.
        scratch: `scratch_elements` elements.
    """
    from qwen_vram.runtime.attention import decode_kernels

    batch, (length, kv_heads, _) = query.shape[0], keys.shape
    splits = decode_splits(batch, kv_heads, length // batch)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        return decode_kernels.attend(
            query, key, value, *tables, keys, values, starts, filled, scratch, scale=scale, splits=splits
        )
