"""Orders in which torch's int4 kernels keep codes: made by torch's own operators, read back here.

Source: torch 2.11 to 2.13, aten/src/ATen/native/cuda/int4mm.cu (matrix_to_m16n8k16_Bint4_layout) and
cpu/int4mm_kernel.cpp (weight_to_int4pack_kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Inner k-tiles of CUDA's layout: the widest, 16 bytes a lane.
_INNER = 8


def pair(codes: Tensor) -> Tensor:
    """Codes of 0 to 15, (rows, columns) in any dtype, two a byte: (rows, columns / 2).

    The even column is in the high half. So checkpoints store them, whatever the device.
    """
    codes = codes.to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2]


def unpair(pairs: Tensor) -> Tensor:
    """The codes of pairs, (rows, columns / 2), as uint8: (rows, columns)."""
    return torch.stack((pairs >> 4, pairs & 15), -1).view(pairs.shape[0], -1)


def arrange(pairs: Tensor) -> Tensor:
    """Pairs, (rows, columns / 2), as the kernel of their device reads them: as many bytes, in another order."""
    packed: Tensor
    if pairs.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpair(pairs).to(torch.int32), 1)
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER)
    return packed


def as_packed(room: Tensor) -> Tensor:
    """Room for pairs, (rows, columns / 2) in uint8, seen as the kernel of its device does."""
    rows, half = room.shape
    if room.device.type == "cpu":
        return room
    return room.view(torch.int32).view(rows // 8, half // (_INNER * 8), 32, _INNER // 2)


def rows_of(packed: Tensor, start: int, end: int) -> Tensor:
    """The part of packed codes that holds rows `start` to `end`: multiples of 64, or the end."""
    return packed[start:end] if packed.device.type == "cpu" else packed[start // 8 : end // 8]


def unpack(packed: Tensor, codes: Tensor) -> None:
    """Write the codes less 8 of `rows_of` packed ones to `codes`, (rows, columns) in any dtype that has signs."""
    (_unpack_cpu if packed.device.type == "cpu" else unpack_tiles)(packed, codes)


def unpack_tiles(packed: Tensor, codes: Tensor) -> None:
    """`unpack` for CUDA's layout, (rows / 8, columns / 128, 32, 4) in int32, on any device.

    Lane 4 r + c of a tile holds row r; in word j the low half has the even columns 32 j + 16 a + 8 b + 2 c, the high
    half the odd ones after them, (a, b) = 00, 01, 10, 11 from its lowest nibble on.
    """
    blocks = packed.shape[1]
    stored = packed.view(torch.int8).view(-1, blocks, 8, 4, 4, 2, 2)  # tile, block, r, c, j, odd, a; b: the nibble
    # tile, r, block, j, a, b, c, odd -> the order of `stored`, with b last.
    places = codes.view(-1, 8, blocks, 4, 2, 2, 4, 2).permute(0, 2, 1, 6, 3, 7, 4, 5)
    places[..., 0] = (stored & 15).sub_(8)
    places[..., 1] = (stored >> 4).bitwise_and_(15).sub_(8)


def order_is_known() -> bool:
    """Tell if codes come back as they were packed on the CPU: torch may keep another order on other CPUs."""
    probe = torch.arange(112 * 128).view(112, 128) * 7 % 16
    codes = torch.empty_like(probe)
    unpack(arrange(pair(probe)), codes)
    return torch.equal(codes + 8, probe)


def _unpack_cpu(packed: Tensor, codes: Tensor) -> None:
    """`unpack` for the CPU's layout: blocks of rows, and what is left of them, each column of a block together.

    With AVX a byte of a whole block has a row of its first half and one of its second half; neighbours elsewhere.
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
