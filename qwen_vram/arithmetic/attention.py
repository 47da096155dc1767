"""Lengths and alignments that attention kernels require, for estimator and runtime."""

from __future__ import annotations

# The memory-efficient attention kernel needs rows of its bias that are a multiple of this. Source: torch 2.11,
# aten/src/ATen/native/transformers/attention.cpp, preprocess_mask.
_BIAS_ALIGNMENT = 8
# Fused attention is computed in parts if the chunk is a multiple of _JOINED_ROWS tokens, and at least _JOINED_KEYS keys
# are before it. With 512 rows and 8,192 keys before them cuDNN takes 0.11 ms a layer, flash 0.25.
# Measured: H100 80GB, torch 2.11.0, 2026-11-26, benchmarks/attention_parts.py.
_JOINED_ROWS = 512
_JOINED_KEYS = 4096


def bias_columns(keys: int) -> int:
    """Elements of a row of fused attention's bias over `keys` keys."""
    return -(-keys // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT


def joined_rows(queries: int, *, padded: bool) -> int:
    """Rows that cuDNN gets of a chunk of `queries` tokens, over keys before it; 0 if flash computes the whole chunk.

    With `padded`, a chunk of another length, such as a prompt's last one, is padded to a power of two. cuDNN has
    already run that length for the chunks before it. For one and a half times the rows, it takes no longer than flash
    takes for the chunk itself.
    """
    if queries % _JOINED_ROWS == 0:
        return queries
    rows = 1 << (queries - 1).bit_length()
    return rows if padded and queries > _JOINED_ROWS and 2 * rows <= 3 * queries else 0


def attention_parts(queries: int, past: int, *, padded: bool = False) -> tuple[int, ...]:
    """Return the lengths of the parts of older keys, without a mask; later keys are in the chunk's own part.

    They are powers of two, so that few lengths are new to cuDNN. There are no parts if `joined_rows` is 0.

    >>> attention_parts(1024, 29696), attention_parts(1000, 29696), attention_parts(1000, 9000, padded=True)
    ((16384, 8192, 4096), (), (8192,))
    """
    if not joined_rows(queries, padded=padded):
        return ()
    blocks = past // _JOINED_KEYS
    return tuple(_JOINED_KEYS << bit for bit in reversed(range(blocks.bit_length())) if blocks >> bit & 1)
