"""Lengths and alignments that attention kernels require, for estimator and runtime."""

from __future__ import annotations

# What the memory-efficient attention kernel asks of the rows of its bias. Source: torch 2.11,
# aten/src/ATen/native/transformers/attention.cpp, preprocess_mask.
_BIAS_ALIGNMENT = 8
# Fused attention of a chunk of whole multiples of so many tokens is made in parts where so many keys come before it:
# with 512 rows and 8,192 keys before them cuDNN takes 0.11 ms a layer, flash 0.25. Measured: H100 80GB, torch 2.11.0,
# 2026-11-26, benchmarks/attention_parts.py.
_JOINED_ROWS = 512
_JOINED_KEYS = 4096


def bias_columns(keys: int) -> int:
    """Elements of a row of fused attention's bias over so many keys."""
    return -(-keys // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT


def joined_rows(queries: int, *, padded: bool) -> int:
    """Rows that cuDNN gets of a chunk of so many queries, over keys before it; 0 where flash takes them all.

    `padded` fills an odd chunk, as a prompt's last one is, to a power of two, which the chunks before it had: cuDNN
    needs no more for one and a half times as many rows than flash for what they were.
    """
    if queries % _JOINED_ROWS == 0:
        return queries
    rows = 1 << (queries - 1).bit_length()
    return rows if padded and queries > _JOINED_ROWS and 2 * rows <= 3 * queries else 0


def attention_parts(queries: int, past: int, *, padded: bool = False) -> tuple[int, ...]:
    """How many of the oldest keys fused attention takes at a time, without a mask; the others go with the chunk's own.

    Powers of two, so that few lengths are new to cuDNN, and none where the chunk is short or odd (`joined_rows`).

    >>> attention_parts(1024, 29696), attention_parts(1000, 29696), attention_parts(1000, 9000, padded=True)
    ((16384, 8192, 4096), (), (8192,))
    """
    if not joined_rows(queries, padded=padded):
        return ()
    blocks = past // _JOINED_KEYS
    return tuple(_JOINED_KEYS << bit for bit in reversed(range(blocks.bit_length())) if blocks >> bit & 1)
