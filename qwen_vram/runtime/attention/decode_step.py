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
from qwen_vram.runtime.kv_cache.arena import KvArena
from qwen_vram.runtime.kv_cache.quantized import QuantizedStates, quantized_states
from qwen_vram.spec.batching.pages import PAGE
from qwen_vram.spec.kv_formats import KvFormatName, kv_format

_LOGGER = logging.getLogger(__name__)

# Keys or values of a layer in the model's own dtype, or of a quantized cache.
States = Tensor | QuantizedStates


class Heads(NamedTuple):
    """Heads of the queries, heads of keys and values, and the size of one."""

    queries: int
    keys: int
    size: int


def scratch_elements(model: Any, batch_size: int, context_len: int, kv_cache: KvFormatName = "bf16") -> int:
    """Return the elements in float32 that the kernels need for any layer; 0 if they do not apply to the model."""
    layers = model.model.layers
    fused = all(isinstance(layer, FusedLayer) for layer in layers)
    if not fused or model.dtype not in (torch.bfloat16, torch.float16) or kernels_on(model.device) is None:
        return 0
    kinds = {_heads(layer.self_attn) for layer in layers}
    for one in kinds:
        if not runs(model.device, model.dtype, one, decode_splits(batch_size, one.keys, context_len), kv_cache):
            return 0
    return max(decode_scratch(batch_size, *one, context_len) for one in kinds)


def _heads(attention: Any) -> Heads:
    size = attention.head_dim
    return Heads(attention.q_proj.out_features // size, attention.k_proj.out_features // size, size)


@lru_cache(maxsize=64)
@torch.inference_mode()
def runs(device: torch.device, dtype: torch.dtype, heads: Heads, splits: int, kv_cache: KvFormatName = "bf16") -> bool:
    """Tell if the kernels run on a device; log once why not, for example too little shared memory.

    The trial compiles the kernels for later steps. It attends to one key.
    """
    stored = kv_format(kv_cache)
    if stored.is_quantized and stored.key_group != DECODE_BLOCK:
        return False

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    query, key, table = empty(1, heads.queries, heads.size), empty(1, heads.keys, heads.size), empty(1, 1, heads.size)
    keys: States = empty(DECODE_BLOCK, heads.keys, heads.size)
    values: States = empty(DECODE_BLOCK, heads.keys, heads.size)
    if stored.is_quantized:
        length = stored.residual + 2 * stored.key_group
        keys, values = quantized_states(key[:, :, None], length, stored, KvArena(1), key.device)
    starts, quantized, filled = (torch.full((1,), number, dtype=torch.int32, device=device) for number in (0, 0, 1))
    scratch = torch.zeros(heads.queries * splits * (heads.size + 1), device=device)
    try:
        _attend(query, key, key, (table, table), keys, values, starts, filled, scratch, 1.0, splits, quantized)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler can raise any error
        said = str(error).strip()[:300]
        if stored.is_quantized:
            _LOGGER.warning("Triton cannot compile attention over a KV cache in %s (%s)", kv_cache, said)
        else:
            text = "captured decode steps use torch's attention, which is slower: Triton cannot compile this library's "
            _LOGGER.warning("%s(%s)", text, said)
        return False
    return True


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor],
    keys: States,
    values: States,
    starts: Tensor,
    filled: Tensor,
    scratch: Tensor,
    scale: float,
    quantized: Tensor,
    pages: Tensor | None = None,
) -> Tensor:
    """Return attention of a token per sequence, (batch, heads, head_dim), after it is written into the cache.

    Args:
        query, key, value: (batch, heads, head_dim), not rotated.
        tables: Cosines and sines, (batch, 1, head_dim).
        keys, values, starts, filled: As for `decode.decode_attention`, or the memory of a quantized cache.
        scratch: `scratch_elements` elements.
        quantized: Number of tokens of a quantized cache that are codes, (1,) in int32.
        pages: Numbers of each sequence's pages, (batch, pages) in int32, if the memory is that of a page pool.
    """
    batch, kv_heads = query.shape[0], key.shape[1]
    if pages is not None:
        length = pages.shape[1] * PAGE
    else:
        length = keys.max_length if isinstance(keys, QuantizedStates) else keys.shape[0] // batch
    splits = decode_splits(batch, kv_heads, length)
    return _attend(query, key, value, tables, keys, values, starts, filled, scratch, scale, splits, quantized, pages)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor],
    keys: States,
    values: States,
    starts: Tensor,
    filled: Tensor,
    scratch: Tensor,
    scale: float,
    splits: int,
    quantized: Tensor,
    pages: Tensor | None = None,
) -> Tensor:
    from qwen_vram.runtime.attention import decode_kernels

    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        return decode_kernels.attend(
            query, key, value, *tables, keys, values, starts, filled, scratch,
            scale=scale, splits=splits, quantized=quantized, pages=pages,
        )  # fmt: skip
