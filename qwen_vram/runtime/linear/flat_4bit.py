"""Products on the CPU of 4-bit matrices whose shapes bitsandbytes' kernels refuse.

On CPUs with AVX512-BF16 `Linear4bit` packs a matrix. That needs a multiple of 32 rows, and columns in multiples of the
block size, mostly 64. On other CPUs it calls `dequantize_4bit`, which returns wrong weights for 96 columns: its kernel
ends a block of weights with the row.
Source: bitsandbytes 0.50.2, functional.py (_convert_weight_packed_for_cpu), backends/cpu/ops.py (dequantize_4bit).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qwen_vram.spec.formats import is_packed


class FlatLinear4bit(Linear4bit):  # type: ignore[misc]
    """`Linear4bit` that dequantizes its matrix on the CPU as one row, in which blocks follow without gaps."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, (..., in_features) to (..., out_features); the whole matrix is dequantized."""
        if x.device.type != "cpu":
            product: Tensor = super().forward(x)
            return product
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, _dequantized(self.weight, x.dtype), bias)


def multiply_flat(model: nn.Module) -> None:
    """Use `FlatLinear4bit` for the 4-bit matrices in `model`, a module, that the CPU's kernels do not support."""
    for module in model.modules():
        if type(module) is Linear4bit:
            state = cast("Any", module.weight).quant_state
            if not is_packed(tuple(state.shape)) or state.shape[1] % state.blocksize:
                module.__class__ = FlatLinear4bit


def _dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix (out_features, in_features) in `dtype`."""
    state = weight.quant_state  # type: ignore[attr-defined]
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.data.view(torch.uint8).view(-1, 1),
        absmax,
        state.blocksize,
        state.quant_type,
        (1, state.shape[0] * state.shape[1]),
        dtype,
    )
    return flat.view(*state.shape)
