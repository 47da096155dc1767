"""int8-wo and fp8 linear layers: one byte per weight, and one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_vram.runtime.linear.weight_only import WeightOnlyLinear, chunks

_LARGEST_INT8 = 127
_LARGEST_E4M3 = 448


class Int8Linear(WeightOnlyLinear):
    """int8 codes from -127 to 127, with scales in the model's dtype."""

    format = "int8-wo"
    scales = "scale"
    scale: Tensor

    @staticmethod
    def empty_codes(matrix: Tensor) -> Tensor:
        """Return an empty tensor for codes, (out_features, in_features) in int8."""
        return torch.empty_like(matrix, dtype=torch.int8)

    @staticmethod
    def empty_scales(matrix: Tensor) -> Tensor:
        """Return an empty tensor for scales, (out_features,)."""
        return matrix.new_empty(matrix.shape[0])

    @classmethod
    def quantize(cls, matrix: Tensor) -> dict[str, Tensor]:
        """Return codes and scales; the largest magnitude of a row has the largest code."""
        weight, scale = cls.empty_codes(matrix), cls.empty_scales(matrix)
        for start, end, rows in chunks(matrix):
            scale[start:end] = _scale(rows, _LARGEST_INT8)
            rows.div_(scale[start:end, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
            weight[start:end] = rows
        return {"weight": weight, "scale": scale}

    def dequantize(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return codes times scales."""
        return torch.mul(self.weight[start:end], self.scale[start:end, None].to(dtype))

    def multiply(self, x: Tensor) -> Tensor | None:
        """Return `None`, because products are computed by tiles only.

        torch's kernel for CPUs crashes if codes or inputs do not begin at a multiple of 16 bytes. A mapped file or a
        view may not. Source: torch 2.13, cpu/int8mm_kernel.cpp, `_mm_load_si128`. The kernel for CUDA computes in
        float32, with one thread per result.
        """
        return None


class Fp8Linear(WeightOnlyLinear):
    """e4m3 codes as bytes, because a model's dtype is that of its floating-point weights; scales in float32."""

    format = "fp8"
    scales = "scale"
    scale: Tensor

    @staticmethod
    def empty_codes(matrix: Tensor) -> Tensor:
        """Return an empty tensor for codes, (out_features, in_features) in uint8."""
        return torch.empty_like(matrix, dtype=torch.uint8)

    @staticmethod
    def empty_scales(matrix: Tensor) -> Tensor:
        """Return an empty tensor for scales, (out_features,) in float32."""
        return matrix.new_empty(matrix.shape[0], dtype=torch.float32)

    @classmethod
    def quantize(cls, matrix: Tensor) -> dict[str, Tensor]:
        """Return codes and scales; the largest magnitude of a row has the largest code."""
        weight, scale = cls.empty_codes(matrix), cls.empty_scales(matrix)
        for start, end, rows in chunks(matrix):
            scale[start:end] = _scale(rows, _LARGEST_E4M3)
            # A quotient that is rounded up past the largest code would become NaN.
            rows.div_(scale[start:end, None]).clamp_(-_LARGEST_E4M3, _LARGEST_E4M3)
            weight[start:end].view(torch.float8_e4m3fn).copy_(rows)
        return {"weight": weight, "scale": scale}

    def dequantize(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return codes times scales."""
        return self.weight[start:end].view(torch.float8_e4m3fn).to(dtype).mul_(self.scale[start:end, None])

    def multiply(self, x: Tensor) -> Tensor | None:
        """Return `None`, because torch multiplies e4m3 only by e4m3, which would round the input too."""
        return None


def _scale(rows: Tensor, largest: int) -> Tensor:
    """Return the divisor of each row, its largest magnitude over the largest code; 1 for a row of zeros."""
    low, high = torch.aminmax(rows, dim=1)
    # Multiplied by the inverse, as GPUs do for a division. CPUs divide, and their scales would differ.
    scale = torch.maximum(high, -low) * (1 / largest)
    return torch.where(scale == 0, 1.0, scale)  # a row with NaN keeps a scale of NaN, so that logits show it
