"""A product with a matrix that is dequantized one tile after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen_vram.arithmetic.tiling import tile_rows


def tiled_product(
    x: Tensor, out_features: int, dequantize: Callable[[int, int], Tensor], bias: Tensor | None
) -> Tensor:
    """Return `x @ matrix.T + bias`: (rows, in_features) to (rows, out_features).

    Args:
        dequantize: Returns rows `start` to `end` of the matrix in x's dtype.
    """
    step = tile_rows(out_features, x.shape[1])
    result = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, step):
        end = min(start + step, out_features)
        tile = dequantize(start, end)
        columns = result[:, start:end]
        if bias is None:
            torch.mm(x, tile.t(), out=columns)
        else:
            torch.addmm(bias[start:end], x, tile.t(), out=columns)
        del tile  # before the next one is allocated
    return result
