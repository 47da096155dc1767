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

# Decode attention: the keys that a program reads at a time, and the number of programs among which keys are divided. A
# part of a sequence's keys has 128 keys. If there are few keys, there are up to 32 parts of at least 32 keys.
# measured: NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-12-01, benchmarks/results/decode_attention.jsonl. The
# rows have 600 to 32,000 keys, 1 and 8 sequences, 8 to 128 parts, and blocks of 16 to 64 keys.
DECODE_BLOCK = 32
_DECODE_PROGRAMS = 512
_PART = 128
_MOST_SHORT, _MOST_SPLITS = 32, 64


def decode_splits(batch_size: int, kv_heads: int, context_len: int) -> int:
    """Return the most parts into which decode attention divides the keys of a sequence: a power of two.

    >>> decode_splits(1, 4, 2304), decode_splits(8, 4, 2304), decode_splits(1, 4, 32768), decode_splits(1, 4, 100)
    (32, 16, 64, 4)
    """
    wanted = max(context_len // _PART, min(_MOST_SHORT, -(-context_len // DECODE_BLOCK)))
    wanted = min(wanted, _MOST_SPLITS, _DECODE_PROGRAMS // (batch_size * kv_heads))
    return 1 << (max(1, wanted) - 1).bit_length()


def decode_scratch(batch_size: int, heads: int, kv_heads: int, head_dim: int, context_len: int) -> int:
    """Elements in float32 of the results of those parts, with a sum for each."""
    return batch_size * heads * decode_splits(batch_size, kv_heads, context_len) * (head_dim + 1)


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
