"""bitsandbytes' 4-bit linear layers, dequantized by tiles for many rows."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qwen_vram.arithmetic.tiling import is_tiled
from qwen_vram.runtime.linear import few_rows
from qwen_vram.runtime.linear.tiled import tiled_product

# From this number of rows on, products are tiled on every GPU.
_MANY_ROWS = 64


class TiledLinear4bit(Linear4bit):  # type: ignore[misc]
    """`Linear4bit` whose product with many rows holds one tile of the matrix in 16 bits at a time.

    Its sums are those of bitsandbytes' own product, which dequantizes the whole matrix first. bitsandbytes computes
    small products, training, and weights that it has repacked for a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`: (..., in_features) to (..., out_features)."""
        state = self.weight.quant_state
        rows = x.numel() // x.shape[-1]
        few = few_rows.multiply(self, x.reshape(rows, -1)) if x.is_cuda and not torch.compiler.is_compiling() else None
        if few is not None:
            return few.view(*x.shape[:-1], -1)
        if (
            not is_tiled(tuple(state.shape), rows)
            or _fused_kernel_runs(x, tuple(state.shape), state.blocksize, rows)
            or x.dtype != state.dtype
            or getattr(state, "packing_format_for_cpu", False)
            or (x.device.type == "cpu" and self.support_avx512bf16_for_cpu)
            or (torch.is_grad_enabled() and x.requires_grad)
        ):
            product: Tensor = super().forward(x)
            return product
        return _product(x.reshape(rows, -1), self.weight, state, self.bias).view(*x.shape[:-1], -1)


def _fused_kernel_runs(x: Tensor, shape: tuple[int, int], blocksize: int, rows: int) -> bool:
    """Tell if bitsandbytes multiplies a few rows without dequantizing the matrix, with less memory than a tile.

    Its choice depends on GPU and shape, and is a private function. Without that function the product is tiled.
    """
    if rows >= _MANY_ROWS or not x.is_cuda or shape[1] % blocksize:
        return False
    from bitsandbytes.backends.cuda import ops

    chooses = getattr(ops, "_gemm_4bit_use_custom_fn", None)
    return chooses is not None and bool(chooses(x.device.index, x.dtype, rows, *shape))


def dequantize_in_tiles(model: nn.Module) -> None:
    """Use tiled products for every 4-bit matrix of `model`."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = TiledLinear4bit


def _product(x: Tensor, weight: Tensor, state: functional.QuantState, bias: Tensor | None) -> Tensor:
    out_features, in_features = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2)
        absmax += state.offset
    packed, blocks = weight.view(-1), in_features / state.blocksize

    def dequantize(start: int, end: int) -> Tensor:
        tile: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed[start * in_features // 2 : end * in_features // 2].view(-1, 1),
            absmax[int(start * blocks) : int(end * blocks)],
            state.blocksize,
            state.quant_type,
            (end - start, in_features),
            state.dtype,
        )
        return tile

    return tiled_product(x, out_features, dequantize, bias)
