"""Triton kernels for products of one to eight rows, which read each matrix once.

A program computes a few columns of the result over the whole of K, so sums are equal in every run. Sums are in float32.
A dequantized value is a code's float32 times its scale. It is not rounded to 16 bits, while bitsandbytes rounds it
before a product by cuBLAS.
"""

# Triton reads annotations as objects, so this module must not postpone their evaluation.

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_vram.spec.formats import QUANT_TYPES

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
_FP4 = (*_FP4_HALF, *(-value for value in _FP4_HALF))

# Methods to look up one of 16 values.
LOAD, SHUFFLE, PERMUTE = "load", "shuffle", "permute"

# Operands below: $0 to $7 are values of a word's eight codes, $8 is the word. A byte's high nibble is its first code.


def _permute_asm(values: tuple[float, ...]) -> str:
    """Return PTX that looks up eight values in registers; eight registers hold the bytes of 16 numbers in fp16.

    fp16 holds these values with 11 bits, and bf16 would hold them with 8.
    """
    bits = np.array(values, dtype=np.float16).view(np.uint16)
    low, high = (
        [f"0x{int.from_bytes(bytes(plane[i : i + 4].tolist()), 'little'):08x}" for i in range(0, 16, 4)]
        for plane in (bits & 255, bits >> 8)
    )
    lines = [
        "{ .reg .b32 s, i, a, b, l, h, p; .reg .b16 u, v;",
        "and.b32 s, $8, 0x77777777; shr.u32 i, $8, 1; and.b32 i, i, 0x44444444; or.b32 i, i, 0x32103210;",
    ]
    for half in range(2):
        if half:
            lines.append("shr.u32 s, s, 16; shr.u32 i, i, 16;")
        for plane, name in ((low, "l"), (high, "h")):
            lines.append(f"prmt.b32 a, {plane[0]}, {plane[1]}, s; prmt.b32 b, {plane[2]}, {plane[3]}, s;")
            lines.append(f"prmt.b32 {name}, a, b, i;")
        for first, order in ((4 * half, "0x5140"), (4 * half + 2, "0x7362")):
            lines.append(f"prmt.b32 p, l, h, {order}; mov.b32 {{u, v}}, p;")
            lines.append(f"cvt.f32.f16 ${first + 1}, u; cvt.f32.f16 ${first}, v;")
    return "\n".join([*lines, "}"])


def _shuffle_asm() -> str:
    """Return PTX that looks up eight values among a warp's lanes: $9 is entry `lane % 16` of the table.

    The shuffle reads the lowest five bits of an index, and the fifth has no effect.
    """
    lines = ["{ .reg .b32 i;", "shfl.sync.idx.b32 $1, $9, $8, 31, 0xffffffff;"]
    for nibble in range(1, 8):
        lines.append(f"shr.u32 i, $8, {4 * nibble};")
        lines.append(f"shfl.sync.idx.b32 ${nibble ^ 1}, $9, i, 31, 0xffffffff;")
    return "\n".join([*lines, "}"])


_PERMUTE_NF4 = tl.constexpr(_permute_asm(_NF4))
_PERMUTE_FP4 = tl.constexpr(_permute_asm(_FP4))
_SHUFFLE = tl.constexpr(_shuffle_asm())
_EIGHT = tl.constexpr(",".join(["=r"] * 8 + ["r"]))
_EIGHT_OF_TABLE = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 2))
_FLOATS = tl.constexpr((tl.float32,) * 8)


@triton.jit
def _half(bits):
    """Return the fp16 number in the low half of an int32, as float32."""
    return (bits & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _floats(pair, BF16: tl.constexpr):
    """Return two neighbours of x, which are one int32, as float32."""
    if BF16:
        even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        even, odd = _half(pair), _half(pair >> 16)
    return even[:, None], odd[:, None]


@triton.jit
def _values(words, table, entry, BF16: tl.constexpr, FORMAT: tl.constexpr, LOOKUP: tl.constexpr):
    """Return the values of a word: eight codes of four bits, four of eight, or two numbers of 16 bits."""
    if FORMAT == "dense":
        if BF16:
            values = ((words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True))
        else:
            values = (_half(words), _half(words >> 16))
    elif FORMAT == "int8-wo":
        values = ()
        for byte in tl.static_range(4):
            values = values + (((words << (24 - 8 * byte)) >> 24).to(tl.float32),)
    elif FORMAT == "fp8":
        # e4m3 has fp16's fields with one exponent bit less: its bits in fp16's positions are the value divided by 256.
        even = ((words & 0x800080) << 8) | ((words & 0x7F007F) << 7)
        odd = (words & -0x7FFF8000) | ((words & 0x7F007F00) >> 1)
        values = (_half(even), _half(odd), _half(even >> 16), _half(odd >> 16))
    elif LOOKUP == "permute":
        if FORMAT == "nf4":
            values = tl.inline_asm_elementwise(_PERMUTE_NF4, _EIGHT, [words], _FLOATS, is_pure=True, pack=1)
        else:
            values = tl.inline_asm_elementwise(_PERMUTE_FP4, _EIGHT, [words], _FLOATS, is_pure=True, pack=1)
    elif LOOKUP == "shuffle":
        values = tl.inline_asm_elementwise(_SHUFFLE, _EIGHT_OF_TABLE, [words, entry], _FLOATS, is_pure=True, pack=1)
    else:
        values = ()
        for code in tl.static_range(8):
            values = values + (tl.load(table + ((words >> (4 * (code ^ 1))) & 15)),)
    return values


@triton.jit
def _sums(
    x, weight, scales, row, width,
    M: tl.constexpr, BF16: tl.constexpr, FORMAT: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return, for each row of x, its products with rows of a matrix.

    It reads `STEP` chunks of 16 bytes of each row of the matrix at a time. One thread reads a chunk and its part of x.
    Chunks are the first dimension, because Triton distributes a warp's threads over the first of equal dimensions. All
    tensors then have one layout, and no data pass through shared memory.
    """
    FOUR_BIT: tl.constexpr = FORMAT == "nf4" or FORMAT == "fp4"
    PAIRS: tl.constexpr = 4 if FOUR_BIT else 1 if FORMAT == "dense" else 2  # of x, for a word of the matrix
    chunks = width // (8 * PAIRS)
    chunk = tl.arange(0, STEP)
    first = row.to(tl.int64) * chunks
    weight_at = weight + (((first[None, :] + chunk[:, None]) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :])
    x_at = x + (chunk[:, None] * (4 * PAIRS) + tl.arange(0, PAIRS)[None, :])
    entry, offset, table, scale = 0.0, 0.0, scales[0], 1.0
    if FOUR_BIT:
        table = scales[1]
        scale_place = (first[None, :] + chunk[:, None]) // 2
        scale = tl.load(scales[0] + scale_place, mask=(chunk < chunks)[:, None], other=0)
        if NESTED:
            offset = tl.load(scales[4])
        if LOOKUP == "shuffle":
            lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
            entry = tl.load(table + (lane & 15))
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros((STEP, ROWS), tl.float32),)
    words = tl.load(weight_at, mask=(chunk < chunks)[:, None, None], other=0)
    for start in range(0, chunks, STEP):
        # The next ones are loaded while these are multiplied.
        ahead = (start + STEP + chunk < chunks)[:, None]
        next_words = tl.load(weight_at + (start + STEP) * 4, mask=ahead[:, :, None], other=0)
        here = start + chunk < chunks
        even, odd = tl.split(tl.reshape(words, (STEP, ROWS, 2, 2)))
        word_0, word_2 = tl.split(even)
        word_1, word_3 = tl.split(odd)
        four = (word_0, word_1, word_2, word_3)
        parts = ()
        for _ in tl.static_range(M):
            parts = parts + (tl.zeros((STEP, ROWS), tl.float32),)
        for v in tl.static_range(4):
            values = _values(four[v], table, entry, BF16, FORMAT, LOOKUP)
            new = ()
            for m in tl.static_range(M):
                place = (m * chunks + start) * (4 * PAIRS) + v * PAIRS
                pairs = tl.load(x_at + place, mask=here[:, None], other=0)
                if FOUR_BIT:
                    first_two, last_two = tl.split(tl.trans(tl.reshape(pairs, (STEP, 2, 2)), 0, 2, 1))
                    pair_0, pair_1 = tl.split(first_two)
                    pair_2, pair_3 = tl.split(last_two)
                    four_pairs = (pair_0, pair_1, pair_2, pair_3)
                elif PAIRS == 1:
                    four_pairs = (tl.reshape(pairs, (STEP,)),)
                else:
                    four_pairs = tl.split(pairs)
                part = parts[m]
                for pair in tl.static_range(PAIRS):
                    x_even, x_odd = _floats(four_pairs[pair], BF16)
                    part += values[2 * pair] * x_even
                    part += values[2 * pair + 1] * x_odd
                new = new + (part,)
            parts = new
        factor = 1.0
        if FOUR_BIT:
            next_scale = tl.load(scales[0] + scale_place + (start + STEP) // 2, mask=ahead, other=0)
            factor = scale
            if NESTED:
                outer = tl.load(scales[3] + ((scale_place + start // 2) >> 8), mask=here[:, None], other=0.0)
                factor = tl.load(scales[2] + scale) * outer + offset
            scale = next_scale
        new = ()
        for m in tl.static_range(M):
            new = new + (sums[m] + parts[m] * factor,)
        sums = new
        words = next_words
    last = 1.0
    if FORMAT == "int8-wo" or FORMAT == "fp8":
        last = tl.load(scales[0] + row).to(tl.float32)
        if FORMAT == "fp8":
            last *= 256.0
    totals = ()
    for m in tl.static_range(M):
        totals = totals + (tl.sum(sums[m], axis=0) * last,)
    return totals


@triton.jit
def _columns(
    x, matrix, program, width,
    M: tl.constexpr, BF16: tl.constexpr, FORMAT: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    BIAS: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute some columns of one product; `matrix` is a `Matrix`.

    The product is rounded before `added` is added to it, as in `transformers`.
    """
    row = program * ROWS + tl.arange(0, ROWS)
    count = matrix[3]
    dtype = matrix[2].dtype.element_ty
    there = tl.minimum(row, count - 1)
    totals = _sums(x, matrix[0], matrix[4], there, width, M, BF16, FORMAT, NESTED, LOOKUP, ROWS, STEP)
    for m in tl.static_range(M):
        total = totals[m]
        if BIAS:
            total += tl.load(matrix[1] + there).to(tl.float32)
        if ADDED:
            total = total.to(dtype).to(tl.float32) + tl.load(matrix[5] + m * count + there).to(tl.float32)
        tl.store(matrix[2] + m * count + row, total.to(dtype), mask=row < count)


@triton.jit
def _multiply(
    x, first, second, third, width,
    M: tl.constexpr, BF16: tl.constexpr, FORMAT: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    BIAS: tl.constexpr, ADDED: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute products with up to three matrices, among which the programs are divided."""
    program = tl.program_id(0)
    if COUNT == 1:
        _columns(x, first, program, width, M, BF16, FORMAT, NESTED, LOOKUP, BIAS, ADDED, ROWS, STEP)
    else:
        end_1 = tl.cdiv(first[3], ROWS)
        end_2 = end_1 + tl.cdiv(second[3], ROWS)
        if program < end_1:
            _columns(x, first, program, width, M, BF16, FORMAT, NESTED, LOOKUP, BIAS, ADDED, ROWS, STEP)
        elif program < end_2:
            _columns(x, second, program - end_1, width, M, BF16, FORMAT, NESTED, LOOKUP, BIAS, ADDED, ROWS, STEP)
        elif COUNT == 3:
            _columns(x, third, program - end_2, width, M, BF16, FORMAT, NESTED, LOOKUP, BIAS, ADDED, ROWS, STEP)


@triton.jit
def _swiglu(
    x, gate, up, width,
    M: tl.constexpr, BF16: tl.constexpr, FORMAT: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute `silu(x @ gate.T) * (x @ up.T)`, rounded after each operation, as in `transformers`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = gate[3]
    there = tl.minimum(row, count - 1)
    gates = _sums(x, gate[0], gate[4], there, width, M, BF16, FORMAT, NESTED, LOOKUP, ROWS, STEP)
    ups = _sums(x, up[0], up[4], there, width, M, BF16, FORMAT, NESTED, LOOKUP, ROWS, STEP)
    dtype = gate[2].dtype.element_ty
    for m in tl.static_range(M):
        one = gates[m].to(dtype).to(tl.float32)
        silu = (one / (1 + tl.exp(-one))).to(dtype).to(tl.float32)
        both = (silu * ups[m].to(dtype).to(tl.float32)).to(dtype)
        tl.store(gate[2] + m * count + row, both, mask=row < count)


class Matrix(NamedTuple):
    """A matrix, and the memory of its product.

    Attributes:
        weight: Codes, or numbers of 16 bits, as words of int32, contiguous.
        bias: (rows,) or `None`.
        out: (M, rows), contiguous.
        rows: The number of rows of the matrix.
        scales: `(scale,)` for rows; `(absmax, table)` for blocks of 64, or `(absmax, table, code, absmax_2, offset)`;
            any tensor for a dense matrix; scales and zeros, two bf16 in an int32, for int4.
        added: (M, rows), contiguous, which is added to the product, or `None`.
    """

    weight: Tensor
    bias: Tensor | None
    out: Tensor
    rows: int
    scales: tuple[Tensor, ...]
    added: Tensor | None = None


class Config(NamedTuple):
    """The division of a product: rows of the matrix per program, blocks or chunks per step, warps, and the look-up.

    `ahead` is the number of steps between a load and its product, for int4.
    """

    rows: int
    step: int
    warps: int
    lookup: str = LOAD
    ahead: int = 1


def multiply(x: Tensor, matrices: tuple[Matrix, ...], storage: str, config: Config) -> None:
    """Compute products of x (M, width), contiguous, with one to three matrices of a storage format in one launch."""
    first, second, third = (*(tuple(one) for one in matrices), None, None)[:3]
    programs = sum(triton.cdiv(one.rows, config.rows) for one in matrices)
    four_bit = storage in QUANT_TYPES
    _multiply[(programs,)](
        x.view(torch.int32), first, second, third, x.shape[1],
        M=x.shape[0], BF16=x.dtype == torch.bfloat16, FORMAT=storage, NESTED=len(matrices[0].scales) > 2,
        LOOKUP=config.lookup if four_bit else LOAD, BIAS=matrices[0].bias is not None,
        ADDED=matrices[0].added is not None, COUNT=len(matrices), ROWS=config.rows, STEP=config.step,
        num_warps=config.warps,
    )  # fmt: skip


def swiglu(x: Tensor, gate: Matrix, up: Matrix, storage: str, config: Config) -> None:
    """Compute `silu(x @ gate.T) * (x @ up.T)` into the gate's result, for matrices of one shape without biases."""
    four_bit = storage in QUANT_TYPES
    _swiglu[(triton.cdiv(gate.rows, config.rows),)](
        x.view(torch.int32), tuple(gate), tuple(up), x.shape[1],
        M=x.shape[0], BF16=x.dtype == torch.bfloat16, FORMAT=storage, NESTED=len(gate.scales) > 2,
        LOOKUP=config.lookup if four_bit else LOAD, ROWS=config.rows, STEP=config.step, num_warps=config.warps,
    )  # fmt: skip
