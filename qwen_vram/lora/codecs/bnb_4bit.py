"""NF4 and FP4 of bitsandbytes, encoded some rows at a time.

Codes, scales and names are those of bitsandbytes for the whole tensor. A block never crosses the edge of a piece, and
double quantization waits until the block maxima of the whole tensor are known.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from qwen_vram.lora.codecs.base import Part
from qwen_vram.lora.codecs.scratch import scratch
from qwen_vram.lora.codecs.threads import one_thread
from qwen_vram.runtime.backends.bnb import quantization_config
from qwen_vram.spec.formats import BLOCK, NESTED_BLOCK, blocks
from qwen_vram.spec.quantization import four_bit_format

# Elements that are encoded at a time. With fewer, threads wait for the interpreter between operations. More do not fit
# the processor's cache.
_CACHED = 2**18
# Cells from 0 to 1: the table has 64 KiB, and about one value in 4,000 is in a cell with a midpoint.
_CELLS = 2**15
# Marks a cell without a single code. The mark is found in any byte of a word of eight.
_UNSURE = 128
_UNSURE_IN_WORD = int.from_bytes(bytes([_UNSURE] * 8), "little", signed=True)


class FourBit:
    """NF4 and FP4: blocks of 64 codes and their largest value, which double quantization stores in 8 bits."""

    bits = 4
    group_size = BLOCK

    def __init__(self, quant_type: str, *, nested: bool) -> None:
        self.quant_type = quant_type
        self.scales_wait = nested

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Return the parts of bitsandbytes' packed state: codes, block maxima, tables, and a JSON text in bytes."""
        count = blocks(math.prod(shape))
        nested = (
            Part(".weight.nested_absmax", "F32", (-(-count // NESTED_BLOCK),)),
            Part(".weight.nested_quant_map", "F32", (256,)),
        )
        return (
            Part(".weight", "U8", (-(-math.prod(shape) // 2), 1)),
            Part(".weight.absmax", "U8" if self.scales_wait else "F32", (count,)),
            Part(".weight.quant_map", "F32", (16,)),
            *(nested if self.scales_wait else ()),
            Part(f".weight.quant_state.bitsandbytes__{self.quant_type}", "U8", None),
        )

    def row_step(self, columns: int) -> int:
        """Return the number of rows that end at the end of a block, because blocks continue from row to row."""
        return BLOCK // math.gcd(BLOCK, columns)

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return packed codes, the first of two in the high bits, and block maxima in float32."""
        if rows.device.type == "cpu" and rows.numel() % BLOCK == 0:
            return _encode_on_cpu(rows.reshape(-1), self.quant_type)
        codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(rows, BLOCK, self.quant_type, torch.uint8)
        return codes, scales

    def finish(
        self, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the packed state, and block maxima after double quantization."""
        from bitsandbytes.functional import QuantState, dequantize_blockwise, get_4bit_type, quantize_blockwise

        offset = state2 = None
        absmax = scales
        if self.scales_wait:
            offset = scales.mean()  # its last bits depend on the number of threads, in bitsandbytes too
            with one_thread():
                absmax, state2 = quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
                scales = dequantize_blockwise(absmax, state2) + offset
        state = QuantState(
            absmax=absmax,
            shape=torch.Size(shape),
            code=get_4bit_type(self.quant_type, device=scales.device),
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=offset,
            state2=state2,
        )
        return {f".weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}, scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes' values times their block's maximum, in float32.

        They are dequantized as one row, because the CPU's kernel ends a block at the end of a row.
        """
        decoded: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, scales, BLOCK, self.quant_type, (1, math.prod(shape)), torch.float32
        )
        return decoded.view(shape)

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the `quantization_config`: the head is not quantized, and products are in the checkpoint's dtype."""
        name = four_bit_format(self.quant_type, double=self.scales_wait)
        config: dict[str, Any] = quantization_config(name, head=False, dtype=dtype).to_dict()
        return config


def _encode_on_cpu(values: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of `bitsandbytes::quantize_4bit` on the CPU, faster, because codes are looked up in a table.

    The range from -1 to 1 is divided into cells. The number of a cell never falls as the value grows, also with
    rounding. All values of a cell therefore have one code, unless a midpoint is in it. The few values of such cells are
    compared with the midpoint.
    """
    midpoints, order, cells = _tables(quant_type)
    scales = _block_maxima(values)
    inverse = (1.0 / scales.clamp(min=1e-38)).view(-1, 1)
    finite = bool(scales.isfinite().all())
    found = scratch("work", values.shape, torch.uint8)
    for start in range(0, values.numel(), _CACHED):
        some = values[start : start + _CACHED]
        scaled = scratch("scaled", some.shape, torch.float32).copy_(some)
        scaled.view(-1, BLOCK).mul_(inverse[start // BLOCK : (start + len(some)) // BLOCK])
        if not finite:
            scaled.nan_to_num_()  # NaN has no cell; the measured share shows it to the caller
        cell = scaled.view(torch.int32).copy_(_cell(scaled, out=scaled))
        torch.index_select(cells, 0, cell, out=found[start : start + len(some)])
    words = found.view(torch.int64)  # 8 codes in each
    marks = torch.bitwise_and(words, _UNSURE_IN_WORD, out=scratch("spare", words.shape, torch.int64))
    unsure = torch.nonzero(marks)[:, 0]
    scaled = values.view(-1, 8)[unsure] * inverse[unsure // (BLOCK // 8)]
    words[unsure] = order[torch.bucketize(scaled, midpoints)].view(torch.int64)[:, 0]
    # The low byte of a pair is the first code. The low byte of the sum is 16 times the first code, plus the second.
    pairs = found.view(torch.int16)
    high = torch.bitwise_right_shift(pairs, 8, out=scratch("spare", pairs.shape, torch.int16))
    return high.add_(pairs, alpha=16).to(torch.uint8).view(-1, 1), scales


def _block_maxima(values: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of each block in float32; floats without a sign sort by their bits."""
    absolute = torch.abs(values, out=scratch("work", values.shape, values.dtype))
    bits = absolute.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    return bits.view(-1, BLOCK).amax(dim=1).view(values.dtype).float()


def _cell(scaled: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cells of numbers from -1 to 1: 0 to 2 * `_CELLS`, with a fraction to be cut off.

    `_CELLS` is a power of 2, so sums are equal with and without a fused multiply-add.
    """
    return torch.add(torch.tensor(float(_CELLS)), scaled, alpha=_CELLS, out=out)


@cache
def _tables(quant_type: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the midpoints between neighbouring values, the code of each value in order, and the code of each cell.

    The code of a cell with a midpoint is `_UNSURE`.
    """
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(table)
    ordered = table[order]
    midpoints = (ordered[:-1] + ordered[1:]) / 2
    codes = order.to(torch.uint8)
    edges = _cell(midpoints).int()
    cells = codes[torch.bucketize(torch.arange(2 * _CELLS + 1, dtype=torch.int32), edges)]
    cells[edges] = _UNSURE
    return midpoints, codes, cells
