"""4-bit matrices of bitsandbytes whose shapes its kernels for CPUs do not take, multiplied on the CPU all the same.

On CPUs with AVX512-BF16 `Linear4bit` packs a matrix, which needs rows by 32 and columns by the size of a block, mostly
64. Elsewhere it calls `dequantize_4bit`, which gives wrong weights for 96 columns: its kernel takes a block of weights
to end with its row.
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
    """`Linear4bit` that dequantizes its matrix on the CPU as one row, where blocks follow each other without a gap."""

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`: (..., in_features) to (..., out_features), the whole matrix in the dtype of `x`."""
        if x.device.type != "cpu":
            product: Tensor = super().forward(x)
            return product
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, _dequantized(self.weight, x.dtype), bias)


def multiply_flat(model: nn.Module) -> None:
    """Let the 4-bit matrices of `model`, itself or a part of it, that the CPU's kernels do not take multiply flat."""
    for module in model.modules():
        if type(module) is Linear4bit:
            state = cast("Any", module.weight).quant_state
            if not is_packed(tuple(state.shape)) or state.shape[1] % state.blocksize:
                module.__class__ = FlatLinear4bit


def _dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of (out_features, in_features)."""
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
