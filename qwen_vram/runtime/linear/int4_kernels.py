"""Triton kernels for products of one to eight rows with int4 codes.

The codes are in the order of torch's tinygemm kernel: a tile of 8 rows and 128 columns is 32 lanes of four words
(`int4_packing.unpack_tiles`). The words of two tiles are the first operand of a tensor core's product, `mma.m16n8k16`,
and rows of x are the second one. The codes minus 8 are exact in 16 bits, and sums are in float32.
"""

# Triton reads annotations as objects, so this module must not postpone their evaluation.

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_vram.runtime.linear.few_rows_kernels import Config, Matrix

__all__ = ["Config", "Matrix", "multiply", "swiglu"]

# Rows of a tile.
_TILE = 8
# By dtype: two numbers with the last four bits of a mantissa free, minus the first such number minus 8, and 1.
_NUMBERS = {"bf16": (0x43004300, 0xC308C308, 0x3F803F80), "f16": (0x64006400, 0xE408E408, 0x3C003C00)}

# Operands below: $0 and $1 are sums of the first tile, for two rows of x, $2 and $3 those of the second one. Then
# follow four words of each tile, if there are some, and 16 pairs of x. In word j, pair t of x belongs to nibbles t and
# t + 4.
_ZERO = " ".join(f"mov.f32 ${number}, 0f00000000;" for number in range(4))


def _products_asm(dtype: str) -> str:
    """Return PTX of the products of two tiles with 128 columns of up to 8 rows of x."""
    free, least, one = _NUMBERS[dtype]
    lines = [f"{{ .reg .b32 s, o, n, a<4>; {_ZERO} mov.b32 o, 0x{one:08x}; mov.b32 n, 0x{least:08x};"]
    for word in range(4):
        for first in (0, 2):
            for number in range(4):  # both tiles, then both tiles 8 columns further
                tile, nibble = number % 2, first + number // 2
                lines.append(f"shr.u32 s, ${4 + 4 * tile + word}, {4 * nibble};")
                lines.append(f"lop3.b32 a{number}, s, 0x000f000f, 0x{free:08x}, 0xea;")  # (s & mask) | free
                lines.append(f"fma.rn.{dtype}x2 a{number}, a{number}, o, n;")
            lines.append(_mma(dtype, "a0, a1, a2, a3", 12 + 4 * word + first))
    return "\n".join([*lines, "}"])


def _totals_asm(dtype: str) -> str:
    """Return PTX of the sums of 128 columns of up to 8 rows of x, as if they were products with ones."""
    lines = [f"{{ .reg .b32 o; {_ZERO} mov.b32 o, 0x{_NUMBERS[dtype][2]:08x};"]
    lines.extend(_mma(dtype, "o, o, o, o", 4 + pair) for pair in range(0, 16, 2))
    return "\n".join([*lines, "}"])


def _mma(dtype: str, codes: str, pair: int) -> str:
    """Return PTX that adds the products of 16 columns."""
    sums = "{$0, $1, $2, $3}"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {sums}, {{{codes}}}, {{${pair}, ${pair + 1}}}, "
        f"{sums};"
    )


_PRODUCTS_BF16, _PRODUCTS_FP16 = tl.constexpr(_products_asm("bf16")), tl.constexpr(_products_asm("f16"))
_TOTALS_BF16, _TOTALS_FP16 = tl.constexpr(_totals_asm("bf16")), tl.constexpr(_totals_asm("f16"))
_OF_WORDS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24))
_OF_PAIRS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 16))
_FOUR = tl.constexpr((tl.float32,) * 4)


@triton.jit
def _read(at, level_at, start, tiles, blocks, block, BLOCKS: tl.constexpr):
    """Return a tile's words of some blocks of 128 columns as four tensors, and the levels of a row."""
    there = start + block < blocks
    words = tl.load(at + start * 128, mask=there[:, None], other=0)
    even, odd = tl.split(tl.reshape(words, (BLOCKS * 32, 2, 2)))
    word_0, word_2 = tl.split(even)
    word_1, word_3 = tl.split(odd)
    return (word_0, word_1, word_2, word_3), tl.load(level_at + start * tiles * 8, mask=there, other=0)


@triton.jit
def _sums(
    x, matrices, program, width,
    M: tl.constexpr, BF16: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Return the products of 8 rows of x with a program's tiles, (32, 2 TILES), in the order of `_rows`.

    There is one product for each of `COUNT` matrices of one shape, 1 or 2.

    A warp reads two tiles of a block of 128 columns at a time. A program reads `BLOCKS` blocks per step, and loads them
    `AHEAD` steps before they are multiplied. A block's sum is `scale * sum((code - 8) * x) + zero * sum(x)`.
    """
    tiles, blocks = matrices[0][3] // 8, width // 128
    one = tl.arange(0, BLOCKS * 32)
    # Hidden from the compiler, which would give a thread four neighbours of x, and then exchange them.
    lane = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [one % 32], tl.int32, is_pure=True, pack=1)
    block, row, column = one // 32, lane // 4, lane % 4
    x_at = x + row * (width // 2) + block * 64 + column
    places = ()
    sums = ()
    for t in tl.static_range(COUNT * TILES):
        matrix = matrices[t // TILES]
        tile = tl.minimum(program * TILES + t % TILES, tiles - 1).to(tl.int64)
        at = matrix[0] + (((tile * blocks + block) * 32 + one % 32) * 4)[:, None] + tl.arange(0, 4)[None, :]
        places = places + ((at, matrix[4][0] + (block * tiles + tile) * 8 + row),)
        sums = sums + (tl.zeros((BLOCKS * 32,), tl.float32), tl.zeros((BLOCKS * 32,), tl.float32))
    loaded = ()
    for step in tl.static_range(AHEAD):
        for t in tl.static_range(COUNT * TILES):
            one_read = _read(places[t][0], places[t][1], step * BLOCKS, tiles, blocks, block, BLOCKS)
            loaded = loaded + (one_read,)
    for start in range(0, blocks, BLOCKS):
        here = (row < M) & (start + block < blocks)
        pairs = ()
        for pair in tl.static_range(16):
            pairs = pairs + (tl.load(x_at + start * 64 + 4 * pair, mask=here, other=0),)
        following = ()
        for step in tl.static_range(AHEAD - 1):
            for t in tl.static_range(COUNT * TILES):
                following = following + (loaded[(step + 1) * COUNT * TILES + t],)
        for t in tl.static_range(COUNT * TILES):
            later = start + AHEAD * BLOCKS
            one_read = _read(places[t][0], places[t][1], later, tiles, blocks, block, BLOCKS)
            following = following + (one_read,)
        totals_asm: tl.constexpr = _TOTALS_BF16 if BF16 else _TOTALS_FP16
        products_asm: tl.constexpr = _PRODUCTS_BF16 if BF16 else _PRODUCTS_FP16
        total_1, total_2, _, _ = tl.inline_asm_elementwise(totals_asm, _OF_PAIRS, pairs, _FOUR, is_pure=True, pack=1)
        new = ()
        for t in tl.static_range(0, COUNT * TILES, 2):
            words, level = loaded[t]
            more_words, more_level = loaded[t + 1]
            part_1, part_2, part_3, part_4 = tl.inline_asm_elementwise(
                products_asm, _OF_WORDS, words + more_words + pairs, _FOUR, is_pure=True, pack=1
            )
            new = new + (
                sums[2 * t] + (part_1 * _scale(level) + total_1 * _zero(level)),
                sums[2 * t + 1] + (part_2 * _scale(level) + total_2 * _zero(level)),
                sums[2 * t + 2] + (part_3 * _scale(more_level) + total_1 * _zero(more_level)),
                sums[2 * t + 3] + (part_4 * _scale(more_level) + total_2 * _zero(more_level)),
            )
        loaded = following
        sums = new
    products = ()
    for i in tl.static_range(COUNT):
        products = products + (_joined(sums, 2 * TILES * i, TILES, BLOCKS),)
    return products


@triton.jit
def _joined(sums, FIRST: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the sums over all blocks, (32, 2 TILES), of tiles from number `FIRST` on. Warps exchange them once."""
    every = tl.join(tl.join(sums[FIRST], sums[FIRST + 1]), tl.join(sums[FIRST + 2], sums[FIRST + 3]))
    if TILES > 2:
        third, fourth = tl.join(sums[FIRST + 4], sums[FIRST + 5]), tl.join(sums[FIRST + 6], sums[FIRST + 7])
        every = tl.join(every, tl.join(third, fourth))
    return tl.sum(tl.reshape(every, (BLOCKS, 32, 2 * TILES)), axis=0)


@triton.jit
def _rows(program, TILES: tl.constexpr):
    """Return the row of x, and the row of the matrix, of each result of `_sums`."""
    lane, result = tl.arange(0, 32)[:, None], tl.arange(0, 2 * TILES)[None, :]
    tile = result % TILES
    if TILES == 4:  # they were joined in pairs
        tile = tile // 2 + 2 * (tile % 2)
    return 2 * (lane % 4) + result // TILES, (program * TILES + tile) * 8 + lane // 4


@triton.jit
def _scale(level):
    return (level << 16).to(tl.float32, bitcast=True)


@triton.jit
def _zero(level):
    return (level & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _columns(
    x, matrix, program, width,
    M: tl.constexpr, BF16: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute some columns of one product; `matrix` is a `Matrix`."""
    total = _sums(x, (matrix,), program, width, M, BF16, TILES, BLOCKS, AHEAD, 1)[0]
    count = matrix[3]
    dtype = matrix[2].dtype.element_ty
    m, row = _rows(program, TILES)
    inside = (m < M) & (row < count)
    if BIAS:
        total += tl.load(matrix[1] + row, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        added = tl.load(matrix[5] + m * count + row, mask=inside, other=0.0)
        total = total.to(dtype).to(tl.float32) + added.to(tl.float32)
    tl.store(matrix[2] + m * count + row, total.to(dtype), mask=inside)


@triton.jit
def _multiply(
    x, first, second, third, width,
    M: tl.constexpr, BF16: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, COUNT: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute products with up to three matrices, among which the programs are divided."""
    program = tl.program_id(0)
    if COUNT == 1:
        _columns(x, first, program, width, M, BF16, BIAS, ADDED, TILES, BLOCKS, AHEAD)
    else:
        end_1 = tl.cdiv(first[3] // 8, TILES)
        end_2 = end_1 + tl.cdiv(second[3] // 8, TILES)
        if program < end_1:
            _columns(x, first, program, width, M, BF16, BIAS, ADDED, TILES, BLOCKS, AHEAD)
        elif program < end_2:
            _columns(x, second, program - end_1, width, M, BF16, BIAS, ADDED, TILES, BLOCKS, AHEAD)
        elif COUNT == 3:
            _columns(x, third, program - end_2, width, M, BF16, BIAS, ADDED, TILES, BLOCKS, AHEAD)


@triton.jit
def _swiglu(
    x, gate, up, width,
    M: tl.constexpr, BF16: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute `silu(x @ gate.T) * (x @ up.T)`, rounded after each operation, as in `transformers`."""
    program = tl.program_id(0)
    gates, ups = _sums(x, (gate, up), program, width, M, BF16, TILES, BLOCKS, AHEAD, 2)
    count = gate[3]
    dtype = gate[2].dtype.element_ty
    m, row = _rows(program, TILES)
    one = gates.to(dtype).to(tl.float32)
    silu = (one / (1 + tl.exp(-one))).to(dtype).to(tl.float32)
    both = (silu * ups.to(dtype).to(tl.float32)).to(dtype)
    tl.store(gate[2] + m * count + row, both, mask=(m < M) & (row < count))


def multiply(x: Tensor, matrices: tuple[Matrix, ...], storage: str, config: Config) -> None:
    """Compute products of x (M, width), contiguous, with one to three matrices in one launch.

    `config.rows` is 16 or 32, and `config.step` is in blocks of 128 columns.
    """
    first, second, third = (*(tuple(one) for one in matrices), None, None)[:3]
    programs = sum(triton.cdiv(one.rows, config.rows) for one in matrices)
    _multiply[(programs,)](
        x.view(torch.int32), first, second, third, x.shape[1],
        M=x.shape[0], BF16=x.dtype == torch.bfloat16, BIAS=matrices[0].bias is not None,
        ADDED=matrices[0].added is not None, COUNT=len(matrices), TILES=config.rows // _TILE, BLOCKS=config.step,
        AHEAD=config.ahead, num_warps=config.warps,
    )  # fmt: skip


def swiglu(x: Tensor, gate: Matrix, up: Matrix, storage: str, config: Config) -> None:
    """Compute `silu(x @ gate.T) * (x @ up.T)` into the gate's result, for matrices of one shape without biases."""
    _swiglu[(triton.cdiv(gate.rows, config.rows),)](
        x.view(torch.int32), tuple(gate), tuple(up), x.shape[1],
        M=x.shape[0], BF16=x.dtype == torch.bfloat16, TILES=config.rows // _TILE, BLOCKS=config.step,
        AHEAD=config.ahead, num_warps=config.warps,
    )  # fmt: skip
