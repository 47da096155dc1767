"""int4, int8-wo and fp8, encoded some rows at a time.

The result is what `load()` makes of a bf16 matrix, in the order of a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_vram.lora.codecs.base import Part
from qwen_vram.runtime.linear.int4 import encode
from qwen_vram.runtime.linear.int4_packing import unpair
from qwen_vram.runtime.quantize_on_load import LINEARS, WeightOnlyConfig
from qwen_vram.runtime.torch_dtypes import ROWS
from qwen_vram.spec.formats import FORMATS

# `load()` runs these formats in bf16, and casts a matrix to that dtype before it quantizes it.
_DTYPE = torch.bfloat16
# Elements whose int4 levels are searched at a time. Measured with 1 MiB of second-level cache a core: 2**20 takes 1.5
# times as long.
_CACHED = 2**18


class ByRow:
    """int8-wo and fp8: codes of one byte and a scale for each row."""

    scales_wait = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.linear = LINEARS[name]
        self.bits = FORMATS[name].bits
        self.group_size = FORMATS[name].group_size

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Return the tensors that the layer of this format allocates.

        Raises:
            ConfigError: the format cannot hold a matrix of this shape.
        """
        FORMATS[self.name].part_sizes(shape)
        matrix = torch.empty(shape, dtype=_DTYPE, device="meta")
        made = {".weight": self.linear.empty_codes(matrix), f".{self.linear.scales}": self.linear.empty_scales(matrix)}
        return tuple(Part(ending, ROWS[tensor.dtype].stored, tuple(tensor.shape)) for ending, tensor in made.items())

    def row_step(self, columns: int) -> int:
        """Return 1, because rows are independent."""
        return 1

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales, both `(rows, ...)`."""
        made = self.linear.quantize(rows.to(_DTYPE))
        return made["weight"], made[self.linear.scales]

    def finish(
        self, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the scales."""
        return {f".{self.linear.scales}": scales}, scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes times their row's scale, in float32."""
        numbers = codes.view(torch.float8_e4m3fn) if FORMATS[self.name].is_float else codes
        return numbers.float().mul_(scales.float().view(-1, 1))

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the `quantization_config`: the head is not quantized."""
        config: dict[str, Any] = WeightOnlyConfig(self.name, ["lm_head"]).to_dict()
        return config


class ByGroup(ByRow):
    """int4: pairs of codes; a scale and a zero for each group of a row."""

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pairs of codes, and scales with zeros, `(rows, groups, 2)`."""
        pairs, levels = [], []
        for some in torch.split(rows, max(_CACHED // rows.shape[1], 1)):
            made, fitted = encode(some.to(_DTYPE).float())
            pairs.append(made)
            levels.append(torch.cat((fitted.scale, fitted.zero), -1).to(_DTYPE))
        return torch.cat(pairs), torch.cat(levels)

    def finish(
        self, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the scales and zeros, `(groups, rows, 2)`, and those as they are read back."""
        return {f".{self.linear.scales}": scales.transpose(0, 1).contiguous()}, scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return (codes - 8) * scales + zeros, in float32."""
        scale, zero = scales.float()[..., None].unbind(2)
        groups = unpair(codes).float().sub_(8).view(len(codes), -1, self.group_size)
        return torch.addcmul(zero, groups, scale, out=groups)
