"""int4 linear layers on torch's tinygemm kernels.

Groups of 128 weights of a row share a scale and a zero in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.arithmetic.tiling import UNPACK_FROM_ROWS
from qwen_vram.runtime.linear.int4_levels import Levels, codes, fit
from qwen_vram.runtime.linear.int4_packing import arrange, as_packed, pair, rows_of, unpack
from qwen_vram.runtime.linear.weight_only import WeightOnlyLinear, chunks, row_ranges
from qwen_vram.spec.formats import FORMATS

_GROUP = FORMATS["int4"].group_size


class Int4Linear(WeightOnlyLinear):
    """int4 codes in the order of the device's kernel, with scales and zeros (groups, out_features, 2)."""

    format = "int4"
    scales = "scales_and_zeros"
    scales_and_zeros: Tensor

    @staticmethod
    def empty_codes(matrix: Tensor) -> Tensor:
        """Return an empty tensor for codes, (out_features, in_features / 2) in uint8."""
        return matrix.new_empty((matrix.shape[0], matrix.shape[1] // 2), dtype=torch.uint8)

    @staticmethod
    def empty_scales(matrix: Tensor) -> Tensor:
        """Return an empty tensor for scales and zeros, (groups, out_features, 2)."""
        return matrix.new_empty((matrix.shape[1] // _GROUP, matrix.shape[0], 2), dtype=torch.bfloat16)

    @classmethod
    def quantize(cls, matrix: Tensor) -> dict[str, Tensor]:
        """Return codes and levels, which give each group a small squared error."""
        weight, scales_and_zeros = as_packed(cls.empty_codes(matrix)), cls.empty_scales(matrix)
        for start, end, rows in chunks(matrix):
            pairs, levels = encode(rows)
            scales_and_zeros[:, start:end, 0] = levels.scale[..., 0].t()
            scales_and_zeros[:, start:end, 1] = levels.zero[..., 0].t()
            rows_of(weight, start, end).copy_(arrange(pairs))
        return {"weight": weight, "scales_and_zeros": scales_and_zeros}

    def restore(self) -> None:
        """Reorder pairs for the kernel; on a GPU in their own memory, with one chunk beside them."""
        pairs = self.weight.data
        # On the CPU the pairs may be a view of the file.
        packed = as_packed(pairs if pairs.is_cuda else torch.empty_like(pairs))
        for start, end in row_ranges(self.out_features, self.in_features):
            rows_of(packed, start, end).copy_(arrange(pairs[start:end]))
        self.weight = nn.Parameter(packed, requires_grad=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save codes as pairs, in the same order for every device."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.loaded:
            ranges = row_ranges(self.out_features, self.in_features)
            destination[f"{prefix}weight"] = torch.cat([self._pairs(start, end) for start, end in ranges])

    def _pairs(self, start: int, end: int) -> Tensor:
        codes = torch.empty((end - start, self.in_features), dtype=torch.int8, device=self.weight.device)
        unpack(rows_of(self.weight, start, end), codes)
        return pair(codes.add_(8))

    def dequantize(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return codes times scales plus zeros, rounded once, as the kernel does."""
        tile = torch.empty((end - start, self.in_features), dtype=dtype, device=self.weight.device)
        unpack(rows_of(self.weight, start, end), tile)
        groups = tile.view(end - start, -1, _GROUP)
        scale, zero = self.scales_and_zeros[:, start:end].to(dtype).transpose(0, 1)[..., None].unbind(2)
        torch.addcmul(zero, groups, scale, out=groups)
        return tile

    def multiply(self, x: Tensor) -> Tensor | None:
        """Return the product by torch's kernel; `None` for more rows than it is fast for."""
        few = x.shape[0] < UNPACK_FROM_ROWS and x.dtype == torch.bfloat16
        return self.read(x) if few else None

    def read(self, x: Tensor) -> Tensor:
        """Return `x @ matrix.T` for x in bf16, by torch's kernel."""
        aten = torch.ops.aten
        kernel = aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm
        product: Tensor = kernel(x.contiguous(), self.weight, _GROUP, self.scales_and_zeros)
        return product


def encode(rows: Tensor) -> tuple[Tensor, Levels]:
    """Return pairs of codes, (rows, in_features / 2), and levels, (rows, groups, 1), of some rows in float32."""
    groups = rows.view(rows.shape[0], -1, _GROUP)
    levels = fit(groups)
    return pair(codes(groups, levels).add_(8).view_as(rows)), levels
