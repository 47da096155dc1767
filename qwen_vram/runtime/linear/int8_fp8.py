"""int8-wo and fp8 linear layers: one byte per weight, and one scale per row."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from qwen_vram.runtime.linear.weight_only import WeightOnlyLinear, chunks

# The address and the row length, in bytes, that torch's kernel for int8 needs.
_ALIGNMENT = 16
# Rows of a product up to which that kernel is faster than tiles on a CPU with instructions for bf16.
_MOST_ROWS = 8
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

    def restore(self) -> None:
        """Copy codes of a mapped file that do not begin at an address which torch's kernel for CPUs allows."""
        if self.weight.device.type == "cpu" and not _aligned(self.weight):
            self.weight = nn.Parameter(self.weight.data.clone(), requires_grad=False)

    def multiply(self, x: Tensor) -> Tensor | None:
        """Return the product by torch's kernel on a CPU in bf16; `None` if tiles are faster or the kernel cannot run.

        The kernel crashes if codes or inputs do not begin at a multiple of 16 bytes. Source: torch 2.13,
        cpu/int8mm_kernel.cpp, `_mm_load_si128`. The kernel for CUDA computes in float32, with one thread per result.
        """
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or self.scale.dtype != x.dtype:
            return None
        many = len(x) > _MOST_ROWS and _multiplies_bf16()
        if many or torch.compiler.is_compiling() or self.in_features % _ALIGNMENT or not _aligned(self.weight):
            return None
        x = x.contiguous()
        return _pack_mm(x if _aligned(x) else x.clone(), self.weight, self.scale)


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


def _pack_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int8pack_mm(x, codes, scale)
    return product


def _aligned(tensor: Tensor) -> bool:
    """Tell if a tensor begins at an address that torch's kernel for int8 allows."""
    return tensor.data_ptr() % _ALIGNMENT == 0


@cache
def _multiplies_bf16() -> bool:
    """Tell if the CPU has instructions for products in bf16, with which tiles of many rows are fast."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
