"""bitsandbytes' int8 linear layers with memory that does not depend on the data.

In each product, bitsandbytes copies the matrix columns of the input's outliers twice in float32. The memory then
depends on the text, and blocks of slightly different sizes in each layer leave gaps that no later block fits.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn

from qwen_vram.arithmetic.tiling import int8_rows, int8_tile_elements

# Factor of a row's scale, for codes of -127 to 127. Source: bitsandbytes 0.50.2, 1 / 127 in float32.
_PER_CODE = 7.874015718698502e-3


class TiledLinear8bit(Linear8bitLt):  # type: ignore[misc]
    """`Linear8bitLt` that multiplies pieces of the input's rows, with outlier columns in buffers of a fixed size.

    The sums of a piece are those of bitsandbytes. The columns with outliers are determined for each piece.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`: (..., in_features) to (..., out_features)."""
        rows = x.numel() // x.shape[-1]
        state = self.state
        if state.has_fp16_weights or not rows or (torch.is_grad_enabled() and x.requires_grad):
            product: Tensor = super().forward(x)
            return product
        if self.weight.CB is not None:
            self.init_8bit_state()
        out_features, in_features = state.CB.shape
        shape = x.shape[:-1]
        x = x.reshape(rows, in_features)
        step = int8_rows(out_features, in_features)
        if rows <= step:
            result = self._piece(x)
        else:
            result = x.new_empty(rows, out_features)
            for start in range(0, rows, step):
                result[start : start + step] = self._piece(x[start : start + step])
        return result.view(*shape, -1)

    def _piece(self, x: Tensor) -> Tensor:
        state = self.state
        codes, scales, columns = torch.ops.bitsandbytes.int8_vectorwise_quant.default(
            x.to(torch.float16), state.threshold
        )
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        result: Tensor = torch.ops.bitsandbytes.int8_scaled_mm.default(
            codes, state.CB, scales, state.SCB, bias=bias, dtype=x.dtype
        )
        del codes
        _add_outliers(result, x, state.CB, state.SCB, columns)
        return result


def multiply_int8_in_pieces(model: nn.Module) -> None:
    """Use tiled products for every int8 matrix of `model`."""
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = TiledLinear8bit


def _add_outliers(result: Tensor, x: Tensor, weight: Tensor, scales: Tensor, columns: Tensor | None) -> None:
    """Add `x[:, columns] @ (weight in 16 bits)[:, columns].T`; the buffers are allocated with or without outliers.

    With a threshold of 0 bitsandbytes has no `columns`.
    """
    elements = int8_tile_elements(*weight.shape)
    inputs = torch.empty_like(x).view(-1)
    taken = weight.new_empty(elements)
    wide = torch.empty(elements, dtype=torch.float32, device=x.device)
    narrow = x.new_empty(elements)
    if columns is None or not columns.numel():
        return
    count = columns.numel()
    inputs = inputs[: x.shape[0] * count].view(-1, count)
    torch.index_select(x, 1, columns, out=inputs)
    step = elements // count
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step]
        tile = taken[: len(part) * count].view(-1, count)
        scaled, rounded = (buffer[: tile.numel()].view(tile.shape) for buffer in (wide, narrow))
        torch.index_select(part, 1, columns, out=tile)
        torch.mul(tile, scales[start : start + step].view(-1, 1), out=scaled)
        rounded.copy_(scaled.mul_(_PER_CODE))
        result[:, start : start + step].addmm_(inputs, rounded.t())
