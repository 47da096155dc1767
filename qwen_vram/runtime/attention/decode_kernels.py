"""Triton kernels of attention of one new token, with its rotation and its cache write.

Products are of 16-bit numbers, sums in float32, and a probability is rounded to 16 bits before it multiplies values, as
in flash attention. The codes of a quantized cache are dequantized one block at a time, with the roundings of
`kv_cache.quantized`, so no dequantized cache is stored.
"""

# Triton reads annotations as objects, so this module must not postpone their evaluation.

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_vram.arithmetic.attention import DECODE_BLOCK
from qwen_vram.runtime.kv_cache.quantized import QuantizedStates
from qwen_vram.spec.batching.pages import PAGE

States = Tensor | QuantizedStates
_LOG2_E = 1.4426950408889634
# Rows of a matrix product in Triton, at least.
_LEAST_ROWS = 16
# Warps of a program over keys in 16 bits, and over codes.
_WARPS, _CODE_WARPS = 4, 4


@triton.jit
def _rotated(at, cos, sin, column, inside, half):
    """Return both halves of rotated heads, rounded after each operation as in `transformers`."""
    dtype = at.dtype.element_ty
    one = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(at + column + half, mask=inside, other=0.0).to(tl.float32)
    cos_1 = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + column + half, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + column + half, mask=inside, other=0.0).to(tl.float32)
    new_one = (one * cos_1).to(dtype).to(tl.float32) + (-two * sin_1).to(dtype).to(tl.float32)
    new_two = (two * cos_2).to(dtype).to(tl.float32) + (one * sin_2).to(dtype).to(tl.float32)
    return new_one.to(dtype), new_two.to(dtype)


@triton.jit
def _part_of(count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the number of keys of a part: whole blocks, so that at most `SPLITS` parts have all `count` keys."""
    return tl.cdiv(tl.cdiv(count, SPLITS), BLOCK) * BLOCK


@triton.jit
def _both_codes(codes, row, column, half, mask, BITS: tl.constexpr):
    """Return the codes of both halves of heads, in float32; `row` is the number of a head, (BLOCK,)."""
    if BITS == 4:
        both = tl.load(codes + row[:, None] * half + column, mask=mask, other=0)
        return (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
    at = codes + row[:, None] * (2 * half) + column
    return tl.load(at, mask=mask, other=0).to(tl.float32), tl.load(at + half, mask=mask, other=0).to(tl.float32)


@triton.jit
def _of_groups(levels, column, width, inside, has_second, is_second):
    """Return a level of each channel for the keys of a block, which are in one group or in two."""
    first = tl.load(levels + column, mask=inside, other=0.0)
    second = tl.load(levels + width + column, mask=inside & has_second, other=0.0)
    return tl.where(is_second[:, None], second[None, :], first[None, :]).to(tl.float32)


@triton.jit
def _dequantized(codes, scale, least, dtype: tl.constexpr):
    """Return codes as numbers, rounded after each operation as `kv_cache.quantized` does."""
    return ((codes * scale).to(dtype).to(tl.float32) + least).to(dtype)


@triton.jit
def _with_block(
    query_1, query_2, keys_1, keys_2, values_1, values_2, seen, scale, most, total, result_1, result_2
):  # fmt: skip
    """Return the running maximum, sum and results with the keys of one more block, of which `seen` count."""
    scores = tl.dot(query_2, tl.trans(keys_2), acc=tl.dot(query_1, tl.trans(keys_1)))
    scores = tl.where(seen[None, :], scores * scale, float("-inf"))
    new_most = tl.maximum(most, tl.max(scores, axis=1))
    shares = tl.exp2(scores - new_most[:, None])
    factor = tl.exp2(most - new_most)
    total = total * factor + tl.sum(shares, axis=1)
    rounded = shares.to(keys_1.dtype)
    result_1 = tl.dot(rounded, values_1, acc=result_1 * factor[:, None])
    result_2 = tl.dot(rounded, values_2, acc=result_2 * factor[:, None])
    return new_most, total, result_1, result_2


@triton.jit
def _origin(table, place, kv_head, kv_heads, width, PAGE: tl.constexpr):
    """Return the element that is `place` rows before key `place`, by the page that holds the key."""
    number = place // PAGE
    page = tl.load(table + number).to(tl.int64)
    return ((page - number) * PAGE * kv_heads + kv_head) * width


@triton.jit
def _attend(
    query, key, value, cos, sin, keys, values, starts, filled, results, sums, scale, half,
    key_codes, key_scales, key_leasts, value_codes, value_scales, value_leasts, quantized, length, old_length,
    new_length, pages, table_width,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    BITS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Compute attention of a group of heads over one part of the keys of a sequence.

    The part with the newest key rotates that key, and writes it and its value into the cache. In a quantized cache
    (`BITS` is not 0) the tokens before `quantized` are codes. The others are in `keys` and `values`. In a paged cache
    (`PAGE` is not 0) the keys of a sequence are in its row of `pages`.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    count = tl.load(filled + batch)
    size = _part_of(count, SPLITS, BLOCK)
    begin = split * size
    end = tl.minimum(begin + size, count)
    if begin < count:
        dtype = keys.dtype.element_ty
        width = 2 * half
        column = tl.arange(0, HALF)
        inside = column < half
        one_row = tl.arange(0, 1)[:, None] + column[None, :]
        group = tl.arange(0, ROWS)
        head = batch * kv_heads * GROUP + kv_head * GROUP + group
        heads = query + (head * width)[:, None]
        there = (group < GROUP)[:, None] & inside[None, :]
        cosines, sines = cos + batch * width, sin + batch * width
        query_1, query_2 = _rotated(heads, cosines, sines, column[None, :], there, half)
        pair = batch * kv_heads + kv_head
        newest = pair * width
        key_1, key_2 = _rotated(key + newest, cosines, sines, one_row, inside[None, :], half)
        value_1 = tl.load(value + newest + one_row, mask=inside[None, :], other=0.0)
        value_2 = tl.load(value + newest + half + one_row, mask=inside[None, :], other=0.0)
        first = tl.load(starts + batch).to(tl.int64)
        last = count - 1
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        result_1 = tl.zeros((ROWS, HALF), tl.float32)
        result_2 = tl.zeros((ROWS, HALF), tl.float32)
        # Key `place` of the sequence is in row `origin + place * stride`, in elements.
        table = pages + batch * table_width
        if PAGE > 0:
            whole = begin
            origin, stride = _origin(table, last, kv_head, kv_heads, width, PAGE), kv_heads * width
            has_row = end == count
        elif BITS == 0:
            whole = begin
            origin, stride = (first * kv_heads + kv_head) * width, kv_heads * width
            has_row = end == count
        else:
            old = tl.load(quantized)
            first -= batch * length
            origin, stride = (pair * new_length + first - old) * width, width
            has_row = (end == count) & (first + last - old < new_length)  # a rehearsal has no row for its token
            whole = tl.maximum(begin, tl.minimum(end, old - first).to(tl.int32))
            for start in range(begin, whole, BLOCK):
                place = start + tl.arange(0, BLOCK)
                token = first + place
                is_old = place < whole
                mask = is_old[:, None] & inside[None, :]
                stored = pair * old_length + token
                # Padding shifts a block against the groups of keys, so its keys can be in two of them.
                near = (first + start) // BLOCK
                is_second = token // BLOCK > near
                has_second = near + 1 < old_length // BLOCK
                at = (pair * (old_length // BLOCK) + near) * width
                codes_1, codes_2 = _both_codes(key_codes, stored, column[None, :], half, mask, BITS)
                scale_1 = _of_groups(key_scales + at, column, width, inside, has_second, is_second)
                scale_2 = _of_groups(key_scales + at + half, column, width, inside, has_second, is_second)
                least_1 = _of_groups(key_leasts + at, column, width, inside, has_second, is_second)
                least_2 = _of_groups(key_leasts + at + half, column, width, inside, has_second, is_second)
                keys_1 = _dequantized(codes_1, scale_1, least_1, dtype)
                keys_2 = _dequantized(codes_2, scale_2, least_2, dtype)
                codes_1, codes_2 = _both_codes(value_codes, stored, column[None, :], half, mask, BITS)
                level = tl.load(value_scales + stored, mask=is_old, other=0.0).to(tl.float32)[:, None]
                least = tl.load(value_leasts + stored, mask=is_old, other=0.0).to(tl.float32)[:, None]
                values_1 = _dequantized(codes_1, level, least, dtype)
                values_2 = _dequantized(codes_2, level, least, dtype)
                most, total, result_1, result_2 = _with_block(
                    query_1, query_2, keys_1, keys_2, values_1, values_2, is_old, scale, most, total, result_1, result_2
                )
        if has_row:
            here = origin + last * stride
            tl.store(keys + here + one_row, key_1, mask=inside[None, :])
            tl.store(keys + here + half + one_row, key_2, mask=inside[None, :])
            tl.store(values + here + one_row, value_1, mask=inside[None, :])
            tl.store(values + here + half + one_row, value_2, mask=inside[None, :])
        for start in range(whole, end, BLOCK):
            if PAGE > 0:  # a block is in one page
                origin = _origin(table, start, kv_head, kv_heads, width, PAGE)
            place = start + tl.arange(0, BLOCK)
            row = (origin + place.to(tl.int64) * stride)[:, None] + column[None, :]
            held = (place < tl.minimum(end, last))[:, None] & inside[None, :]
            is_last = (place == last)[:, None]
            keys_1 = tl.where(is_last, key_1, tl.load(keys + row, mask=held, other=0.0))
            keys_2 = tl.where(is_last, key_2, tl.load(keys + row + half, mask=held, other=0.0))
            values_1 = tl.where(is_last, value_1, tl.load(values + row, mask=held, other=0.0))
            values_2 = tl.where(is_last, value_2, tl.load(values + row + half, mask=held, other=0.0))
            most, total, result_1, result_2 = _with_block(
                query_1,
                query_2,
                keys_1,
                keys_2,
                values_1,
                values_2,
                place < end,
                scale,
                most,
                total,
                result_1,
                result_2,
            )
        out = head * SPLITS + split
        tl.store(sums + out, most + tl.log2(total), mask=group < GROUP)
        at = results + (out * width)[:, None] + column[None, :]
        tl.store(at, result_1 / total[:, None], mask=there)
        tl.store(at + half, result_2 / total[:, None], mask=there)


@triton.jit
def _join(
    results, sums, filled, out, heads, width, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Join the parts of one head of a sequence."""
    head = tl.program_id(0).to(tl.int64)
    count = tl.load(filled + head // heads)
    parts = tl.cdiv(count, _part_of(count, SPLITS, BLOCK))
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    made = split < parts
    logs = tl.load(sums + head * SPLITS + split, mask=made, other=float("-inf"))
    shares = tl.exp2(logs - tl.max(logs, axis=0))
    shares = shares / tl.sum(shares, axis=0)
    inside = made[:, None] & (column < width)[None, :]
    each = tl.load(results + ((head * SPLITS + split) * width)[:, None] + column[None, :], mask=inside, other=0.0)
    total = tl.sum(each * shares[:, None], axis=0)
    tl.store(out + head * width + column, total.to(out.dtype.element_ty), mask=column < width)


def attend(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: States, values: States,
    starts: Tensor, filled: Tensor, scratch: Tensor, *, scale: float, splits: int, quantized: Tensor,
    pages: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return attention (batch, heads, head_dim) of a token per sequence, after it is written into the cache.

    Args:
        query: (batch, heads, head_dim), not rotated; `key` and `value` have the heads of the cache. All are contiguous.
        cos, sin: (batch, 1, head_dim).
        keys, values: (batch x max_length, kv_heads, head_dim), or those of a quantized cache.
        starts: Row of each sequence's first key, (batch,) or more.
        filled: Number of keys of each sequence with the new one, (batch,).
        scratch: float32, `arithmetic.attention.decode_scratch` elements at least.
        splits: The most parts of a sequence's keys, a power of two.
        quantized: Number of tokens of a quantized cache that are codes, (1,) in int32.
        pages: Numbers of each sequence's pages in int32, (batch, pages), if `keys` and `values` are pages.
    """
    batch, heads, width = query.shape
    kv_heads = key.shape[1]
    group, half = heads // kv_heads, width // 2
    sums, results = scratch[: batch * heads * splits], scratch[batch * heads * splits :]
    out = torch.empty_like(query)
    newest, lengths, bits = (keys, values), (0, 0, 0), 0
    codes: tuple[Tensor, ...] = (query,) * 6
    if isinstance(keys, QuantizedStates) and isinstance(values, QuantizedStates):
        newest = keys.newest, values.newest
        codes = (*keys.codes.tensors(), *values.codes.tensors())
        lengths = keys.max_length, keys.codes.data.shape[2], keys.newest.shape[2]
        bits = keys.codes.stored.bits
    _attend[(splits, kv_heads, batch)](
        query, key, value, cos, sin, *newest, starts, filled, results, sums, scale * _LOG2_E, half,
        *codes, quantized, *lengths, quantized if pages is None else pages, 0 if pages is None else pages.stride(0),
        GROUP=group, ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        HALF=max(_LEAST_ROWS, triton.next_power_of_2(half)), BLOCK=DECODE_BLOCK, SPLITS=splits, BITS=bits,
        PAGE=0 if pages is None else PAGE,
        num_warps=_CODE_WARPS if bits else _WARPS,
        enable_fp_fusion=False,  # with it, one product of a rotation would be added without rounding
    )  # fmt: skip
    _join[(batch * heads,)](
        results, sums, filled, out, heads, width,
        WIDTH=triton.next_power_of_2(width), BLOCK=DECODE_BLOCK, SPLITS=splits, num_warps=4,
    )  # fmt: skip
    return out
