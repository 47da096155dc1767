"""Quantization by bitsandbytes of some rows at a time, with a tile's memory.

The bytes are those of quantizing the whole matrix.

A head of 152,064 x 3,584 takes 1.09 GB in 16 bits, more than all other tensors of a streamed model on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bitsandbytes import functional
from torch import Tensor

from qwen_vram.arithmetic.tiling import tile_rows
from qwen_vram.spec.formats import BLOCK, NESTED_BLOCK, blocks


def four_bit(
    weight: Tensor, device: torch.device, *, quant_type: str, nested: bool
) -> tuple[Tensor, functional.QuantState]:
    """Return codes and state on `device`, equal to `quantize_4bit` of the whole (out_features, in_features) matrix."""
    codes = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks(weight.numel()), dtype=torch.float32, device=device)
    for start, rows in _tiles(weight):
        first = start * weight.shape[1]
        some, largest = torch.ops.bitsandbytes.quantize_4bit.default(rows.to(device), BLOCK, quant_type, torch.uint8)
        codes[first // 2 : first // 2 + len(some)] = some
        absmax[first // BLOCK : first // BLOCK + len(largest)] = largest
        del some, largest
    offset = state2 = None
    if nested:
        offset = absmax.mean()
        absmax, state2 = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=functional.get_4bit_type(quant_type, device=device),
        quant_type=quant_type,
        offset=offset,
        state2=state2,
    )
    return codes, state


def eight_bit(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return codes and row scales on `device`, equal to `int8_vectorwise_quant` of the whole matrix."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=device)
    for start, rows in _tiles(weight):
        some, largest, _ = functional.int8_vectorwise_quant(rows.to(device, torch.float16))
        codes[start : start + len(rows)] = some
        scales[start : start + len(rows)] = largest
        del some
    return codes, scales


def _tiles(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = tile_rows(*weight.shape)
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step]
