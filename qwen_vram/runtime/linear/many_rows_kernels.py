"""Triton kernel for products of up to 64 rows with matrices in 4 bits, on tensor cores.

A warp reads 32 rows of the matrix and all rows of x, 128 columns at a time. A thread's codes become the first operand
of `mma.m16n8k16` in its registers: any columns may be the product's inner dimension, if x has the same ones. The
dequantized matrix is never in memory. A value is rounded to 16 bits before it is multiplied, as bitsandbytes does, and
sums are in float32.
"""

# Triton reads annotations as objects, so this module must not postpone their evaluation.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_vram.runtime.linear.few_rows_kernels import Matrix

# Columns of a step, rows of the matrix in a warp, and rows of x in a product on a tensor core.
COLUMNS = 128
_WARP_ROWS = tl.constexpr(32)
_TILE = 8


def _decode_asm(dtype: str) -> str:
    """Return PTX that dequantizes eight codes of a word, $4, into four pairs; $5 is an entry of the table, $6 a scale.

    A lane has entry `lane % 16`. A byte's high nibble is its first code.
    """
    lines = ["{ .reg .b32 i, v<8>;", "shfl.sync.idx.b32 v1, $5, $4, 31, 0xffffffff;"]
    for nibble in range(1, 8):
        lines.append(f"shr.u32 i, $4, {4 * nibble};")
        lines.append(f"shfl.sync.idx.b32 v{nibble ^ 1}, $5, i, 31, 0xffffffff;")
    lines.extend(f"mul.f32 v{number}, v{number}, $6;" for number in range(8))
    lines.extend(f"cvt.rn.{dtype}x2.f32 ${pair}, v{2 * pair + 1}, v{2 * pair};" for pair in range(4))
    return "\n".join([*lines, "}"])


def _products_asm(dtype: str) -> str:
    """Return PTX that adds products of 32 columns to sums, $4 to $7.

    $8 to $11 are pairs of the matrix in a lane's first row, $12 to $15 in its second one, $16 to $19 pairs of x.
    """
    kind = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    sums = "{$0, $1, $2, $3}"
    return (
        f"{kind} {sums}, {{$8, $12, $9, $13}}, {{$16, $17}}, {{$4, $5, $6, $7}};\n"
        f"{kind} {sums}, {{$10, $14, $11, $15}}, {{$18, $19}}, {sums};"
    )


_DECODE_BF16, _DECODE_FP16 = tl.constexpr(_decode_asm("bf16")), tl.constexpr(_decode_asm("f16"))
_PRODUCTS_BF16, _PRODUCTS_FP16 = tl.constexpr(_products_asm("bf16")), tl.constexpr(_products_asm("f16"))
_OF_WORD = tl.constexpr("=r,=r,=r,=r,r,r,f")
_OF_PAIRS = tl.constexpr(",".join(["=&f"] * 4 + ["f"] * 4 + ["r"] * 12))
_INTS = tl.constexpr((tl.int32,) * 4)
_FLOATS = tl.constexpr((tl.float32,) * 4)


@triton.jit
def _four(at, mask, LANES: tl.constexpr):
    """Load four neighbouring words for each lane, as four tensors."""
    words = tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(words, (LANES, 2, 2)))
    word_0, word_2 = tl.split(even)
    word_1, word_3 = tl.split(odd)
    return (word_0, word_1, word_2, word_3)


@triton.jit
def _multiply(
    x, weight, absmax, table, code, outer, offset, bias, added, out, count, blocks,
    M: tl.constexpr, TILES: tl.constexpr, ACROSS: tl.constexpr, DEEP: tl.constexpr, BF16: tl.constexpr,
    NESTED: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Compute columns of a product. `x` is in the order of `fragments`.

    `ACROSS` warps of a program have different rows of the matrix. `DEEP` groups of them have different columns, and
    their sums are added at the end.
    """
    LANES: tl.constexpr = ACROSS * DEEP * 32
    decode_asm: tl.constexpr = _DECODE_BF16 if BF16 else _DECODE_FP16
    products_asm: tl.constexpr = _PRODUCTS_BF16 if BF16 else _PRODUCTS_FP16
    one = tl.arange(0, LANES)
    # Hidden from the compiler, which would distribute neighbouring addresses among threads.
    lane = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [one % 32], tl.int32, is_pure=True, pack=1)
    across, deep = one // 32 % ACROSS, one // 32 // ACROSS
    group, part = lane // 4, lane % 4
    entry = tl.load(table + lane % 16)
    offset_value = 0.0
    if NESTED:
        offset_value = tl.load(offset)
    first = (tl.program_id(0) * ACROSS + across) * _WARP_ROWS + group
    places = ()
    rows = ()
    words = ()
    scales = ()
    for i in tl.static_range(4):  # a lane has rows 0, 8, 16 and 24 of its warp
        row = tl.minimum(first + 8 * i, count - 1).to(tl.int64)
        rows = rows + (row,)
        places = places + (row * (blocks * 16) + part * 4,)
        words = words + (_four(weight + places[i] + deep * 16, deep < blocks, LANES),)
        scales = scales + (tl.load(absmax + row * (blocks * 2) + deep * 2 + part // 2, mask=deep < blocks, other=0),)
    sums = ()
    for _ in tl.static_range(2 * TILES * 4):
        sums = sums + (tl.zeros((LANES,), tl.float32),)
    for start in range(0, blocks, DEEP):
        block = start + deep
        here, ahead = block < blocks, block + DEEP < blocks
        next_words = ()
        next_scales = ()
        for i in tl.static_range(4):
            next_words = next_words + (_four(weight + places[i] + (block + DEEP) * 16, ahead, LANES),)
            place = rows[i] * (blocks * 2) + (block + DEEP) * 2 + part // 2
            next_scales = next_scales + (tl.load(absmax + place, mask=ahead, other=0),)
        values = ()
        for i in tl.static_range(4):
            scale = scales[i]
            if NESTED:
                place = rows[i] * (blocks * 2) + block * 2 + part // 2
                wide = tl.load(outer + (place >> 8), mask=here, other=0.0)
                scale = tl.load(code + scale.to(tl.int32)) * wide + offset_value
            for w in tl.static_range(4):
                values = values + (
                    tl.inline_asm_elementwise(
                        decode_asm, _OF_WORD, [words[i][w], entry, scale], _INTS, is_pure=True, pack=1
                    ),
                )
        new = ()
        for n in tl.static_range(TILES):
            total_0 = (sums[8 * n], sums[8 * n + 1], sums[8 * n + 2], sums[8 * n + 3])
            total_1 = (sums[8 * n + 4], sums[8 * n + 5], sums[8 * n + 6], sums[8 * n + 7])
            for w in tl.static_range(4):
                x_at = x + (((block * TILES + n) * 4 + w) * 32 + lane) * 4
                pairs = _four(x_at, here, LANES)
                total_0 = tl.inline_asm_elementwise(
                    products_asm, _OF_PAIRS, total_0 + values[w] + values[4 + w] + pairs, _FLOATS, is_pure=True, pack=1
                )
                total_1 = tl.inline_asm_elementwise(
                    products_asm, _OF_PAIRS, total_1 + values[8 + w] + values[12 + w] + pairs, _FLOATS,
                    is_pure=True, pack=1,
                )  # fmt: skip
            new = new + (total_0[0], total_0[1], total_0[2], total_0[3])
            new = new + (total_1[0], total_1[1], total_1[2], total_1[3])
        sums = new
        words = next_words
        scales = next_scales
    dtype = out.dtype.element_ty
    if DEEP > 1:
        one = tl.arange(0, ACROSS * 32)
        lane, across = one % 32, one // 32
        first = (tl.program_id(0) * ACROSS + across) * _WARP_ROWS + lane // 4
        part = lane % 4
    for n in tl.static_range(TILES):
        for i in tl.static_range(4):
            row = first + 8 * i
            for j in tl.static_range(2):
                total = sums[8 * n + 2 * i + j]
                if DEEP > 1:
                    total = tl.sum(tl.reshape(total, (DEEP, ACROSS * 32)), axis=0)
                m = 8 * n + 2 * part + j
                kept = (m < M) & (row < count)
                if BIAS:
                    total += tl.load(bias + row, mask=kept, other=0.0).to(tl.float32)
                if ADDED:
                    more = tl.load(added + m * count + row, mask=kept, other=0.0).to(tl.float32)
                    total = total.to(dtype).to(tl.float32) + more
                tl.store(out + m * count + row, total.to(dtype), mask=kept)


class Config(NamedTuple):
    """The division of a product: warps of a program with different rows, and groups of them with different columns."""

    across: int
    deep: int


def fragments(x: Tensor) -> Tensor:
    """Return x (M, width) as words in the order in which threads read it, with M padded to a multiple of 8.

    The result is (width / 128, M / 8, 4, 32, 4): steps, tiles of 8 rows, words of the matrix, lanes, and pairs.
    """
    tiles, blocks = -(-len(x) // _TILE), x.shape[1] // COLUMNS
    if len(x) % _TILE:
        x = torch.nn.functional.pad(x, (0, 0, 0, tiles * _TILE - len(x)))
    parts = x.view(torch.int32).view(tiles, _TILE, blocks, 4, 4, 4)  # tile, row, step, part, word, pair
    return parts.permute(2, 0, 4, 1, 3, 5).contiguous()


def multiply(x: Tensor, matrix: Matrix, config: Config) -> None:
    """Compute a product with a matrix in 4 bits; `x` is the result of `fragments`."""
    absmax, table, *nested = matrix.scales
    code, outer, offset = nested or (absmax, absmax, absmax)
    out = matrix.out
    bias, added = (out if one is None else one for one in (matrix.bias, matrix.added))
    _multiply[(triton.cdiv(matrix.rows, 32 * config.across),)](
        x, matrix.weight, absmax, table, code, outer, offset, bias, added, out, matrix.rows, x.shape[0],
        M=len(out), TILES=x.shape[1], ACROSS=config.across, DEEP=config.deep, BF16=out.dtype == torch.bfloat16,
        NESTED=bool(nested), BIAS=matrix.bias is not None, ADDED=matrix.added is not None,
        num_warps=config.across * config.deep,
    )  # fmt: skip
