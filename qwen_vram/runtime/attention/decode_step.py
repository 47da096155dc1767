"""Attention of captured decode steps, if the kernels of `decode_kernels` apply to a model."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_vram.arithmetic.attention import DECODE_BLOCK, decode_scratch, decode_splits
from qwen_vram.runtime.kernels.fused_layers import FusedLayer
from qwen_vram.runtime.kernels.fused_ops import kernels_on

_LOGGER = logging.getLogger(__name__)


class Heads(NamedTuple):
    """Heads of the queries, heads of keys and values, and the size of one."""

    queries: int
    keys: int
    size: int


def scratch_elements(model: Any, batch_size: int, context_len: int) -> int:
    """Return the elements in float32 that the kernels need for any layer; 0 if they do not apply to the model."""
    layers = model.model.layers
    fused = all(isinstance(layer, FusedLayer) for layer in layers)
    if not fused or model.dtype not in (torch.bfloat16, torch.float16) or kernels_on(model.device) is None:
        return 0
    kinds = {_heads(layer.self_attn) for layer in layers}
    if not all(runs(model.device, model.dtype, one, decode_splits(batch_size, one.keys, context_len)) for one in kinds):
        return 0
    return max(decode_scratch(batch_size, *one, context_len) for one in kinds)


def _heads(attention: Any) -> Heads:
    size = attention.head_dim
    return Heads(attention.q_proj.out_features // size, attention.k_proj.out_features // size, size)


@lru_cache(maxsize=64)
@torch.inference_mode()
def runs(device: torch.device, dtype: torch.dtype, heads: Heads, splits: int) -> bool:
    """Tell if the kernels run on a device; log once why not, for example too little shared memory.

    The trial compiles the kernels for later steps. It attends to one key.
    """

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    query, key, table = empty(1, heads.queries, heads.size), empty(1, heads.keys, heads.size), empty(1, 1, heads.size)
    memory = empty(DECODE_BLOCK, heads.keys, heads.size)
    starts, filled = (torch.full((1,), number, dtype=torch.int32, device=device) for number in (0, 1))
    scratch = torch.zeros(heads.queries * splits * (heads.size + 1), device=device)
    try:
        _attend(query, key, key, (table, table), memory, memory.clone(), starts, filled, scratch, 1.0, splits)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler can raise any error
        _LOGGER.warning(
            "captured decode steps use torch's attention, which is slower: Triton cannot compile this library's (%s)",
            str(error).strip()[:300],
        )
        return False
    return True


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
    batch, (length, kv_heads, _) = query.shape[0], keys.shape
    splits = decode_splits(batch, kv_heads, length // batch)
    return _attend(query, key, value, tables, keys, values, starts, filled, scratch, scale, splits)


def _attend(
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
    splits: int,
) -> Tensor:
    from qwen_vram.runtime.attention import decode_kernels

    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        return decode_kernels.attend(
            query, key, value, *tables, keys, values, starts, filled, scratch, scale=scale, splits=splits
        )
