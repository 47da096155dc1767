"""Packing and unpacking of int4 codes in the orders of torch's kernels.

Source: torch 2.11 to 2.13, aten/src/ATen/native/cuda/int4mm.cu (matrix_to_m16n8k16_Bint4_layout) and
cpu/int4mm_kernel.cpp (weight_to_int4pack_kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Inner k-tiles of CUDA's layout: the largest number, 16 bytes per lane.
_INNER = 8


def pair(codes: Tensor) -> Tensor:
    """Return codes of 0 to 15, (rows, columns) in any dtype, as two per byte: (rows, columns / 2).

    The even column is in the high half. Checkpoints store codes in this form for every device.
    """
    codes = codes.to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2]


def unpair(pairs: Tensor) -> Tensor:
    """Return the codes of pairs, (rows, columns / 2), in uint8: (rows, columns)."""
    return torch.stack((pairs >> 4, pairs & 15), -1).view(pairs.shape[0], -1)


def arrange(pairs: Tensor) -> Tensor:
    """Return pairs, (rows, columns / 2), in the order of their device's kernel, with the same number of bytes."""
    packed: Tensor
    if pairs.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpair(pairs).to(torch.int32), 1)
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER)
    return packed


def as_packed(memory: Tensor) -> Tensor:
    """Return the memory of pairs, (rows, columns / 2) in uint8, as a view in the shape of the device's kernel."""
    rows, half = memory.shape
    if memory.device.type == "cpu":
        return memory
    return memory.view(torch.int32).view(rows // 8, half // (_INNER * 8), 32, _INNER // 2)


def rows_of(packed: Tensor, start: int, end: int) -> Tensor:
    """Return the part of packed codes with rows `start` to `end`, which are multiples of 64, or the end."""
    return packed[start:end] if packed.device.type == "cpu" else packed[start // 8 : end // 8]


def unpack(packed: Tensor, codes: Tensor) -> None:
    """Write the codes minus 8 of `rows_of` packed ones to `codes`, (rows, columns) in a signed dtype."""
    (_unpack_cpu if packed.device.type == "cpu" else unpack_tiles)(packed, codes)


def unpack_tiles(packed: Tensor, codes: Tensor) -> None:
    """Unpack CUDA's layout, (rows / 8, columns / 128, 32, 4) in int32, on any device.

    Lane 4 r + c of a tile holds row r. In word j the low half has the even columns 32 j + 16 a + 8 b + 2 c. The high
    half has the odd columns after them. The pairs (a, b) are 00, 01, 10, 11 from the lowest nibble on.
    """
    blocks = packed.shape[1]
    stored = packed.view(torch.int8).view(-1, blocks, 8, 4, 4, 2, 2)  # tile, block, r, c, j, odd, a; b: the nibble
    # tile, r, block, j, a, b, c, odd -> the order of `stored`, with b last.
    places = codes.view(-1, 8, blocks, 4, 2, 2, 4, 2).permute(0, 2, 1, 6, 3, 7, 4, 5)
    places[..., 0] = (stored & 15).sub_(8)
    places[..., 1] = (stored >> 4).bitwise_and_(15).sub_(8)


def order_is_known() -> bool:
    """Tell if codes packed on this CPU are unpacked correctly: torch may use another order on other CPUs."""
    probe = torch.arange(112 * 128).view(112, 128) * 7 % 16
    codes = torch.empty_like(probe)
    unpack(arrange(pair(probe)), codes)
    return torch.equal(codes + 8, probe)


def _unpack_cpu(packed: Tensor, codes: Tensor) -> None:
    """Unpack the CPU's layout: blocks of rows and a rest, with each column of a block together.

    With AVX, a byte of a full block has a row of its first half and one of its second half. Otherwise it has two
    neighbouring rows.
    """
    rows, columns = codes.shape
    capability = torch.backends.cpu.get_cpu_capability()
    block = 64 if capability == "AVX512" else 32
    whole = rows // block * block
    for start, end, width in ((0, whole, block), (whole, rows, rows - whole)):
        if start == end:
            continue
        stored = packed[start:end].view(torch.int8).reshape(-1, columns, width // 2)
        places = codes[start:end].view(-1, width, columns).transpose(1, 2)
        if width == block and capability in ("AVX512", "AVX2"):
            low, high = places[..., : width // 2], places[..., width // 2 :]
        else:
            low, high = places[..., ::2], places[..., 1::2]
        low.copy_((stored & 15).sub_(8))
        high.copy_((stored >> 4).bitwise_and_(15).sub_(8))
