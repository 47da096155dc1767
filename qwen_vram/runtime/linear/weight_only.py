"""The base class of linear layers with codes on torch's own operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen_vram.arithmetic.tiling import chunk_rows
from qwen_vram.runtime.linear import few_rows
from qwen_vram.runtime.linear.tiled import tiled_product


class WeightOnlyLinear(nn.Linear):
    """`nn.Linear` whose `weight` holds codes, with their scales in a buffer; the bias keeps the model's dtype.

    It is a subclass of `nn.Linear`, so PEFT puts adapters on it. Its product never waits for the GPU.
    """

    format: ClassVar[str]
    scales: ClassVar[str]  # the buffer's name
    loaded = False  # accelerate calls `state_dict()` while it loads, which must cost nothing

    @classmethod
    def adopt(cls, linear: nn.Linear, *, stored: bool) -> None:
        """Make a plain layer on the meta device one of this class, for a matrix to come or for `stored` codes."""
        linear.__class__ = cls
        matrix = linear.weight
        linear.register_buffer(cls.scales, cls.empty_scales(matrix))
        if stored:
            linear.weight = nn.Parameter(cls.empty_codes(matrix), requires_grad=False)

    @staticmethod
    @abstractmethod
    def empty_codes(matrix: Tensor) -> Tensor:
        """Return an empty tensor for the codes of a matrix (out_features, in_features), as a checkpoint stores them."""

    @staticmethod
    @abstractmethod
    def empty_scales(matrix: Tensor) -> Tensor:
        """Return an empty tensor for the scales of a matrix."""

    @classmethod
    @abstractmethod
    def quantize(cls, matrix: Tensor) -> dict[str, Tensor]:
        """Return `weight` and scales of a matrix, on its device, with one chunk of it in float32 at a time."""

    def restore(self) -> None:
        """Reorder stored codes from the checkpoint's order to that of the device's kernel."""

    @abstractmethod
    def dequantize(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return rows `start` to `end` of the matrix, (end - start, in_features)."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor | None:
        """Return `x @ matrix.T` by a kernel that reads codes; `None` if no kernel applies to this number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ matrix.T + bias`: (..., in_features) to (..., out_features)."""
        rows = x.reshape(-1, self.in_features)
        trains = torch.is_grad_enabled() and x.requires_grad
        product = None if trains else self.multiply(rows)
        if product is not None:
            if self.bias is not None:
                product += self.bias
            return product.view(*x.shape[:-1], self.out_features)
        few = few_rows.multiply(self, rows) if x.is_cuda and not torch.compiler.is_compiling() else None
        if few is not None:
            return few.view(*x.shape[:-1], self.out_features)
        if trains or torch.compiler.is_compiling():
            # Products into a result have no gradient, and a compiler dequantizes inside the product.
            matrix = self.dequantize(0, self.out_features, x.dtype)
            if trains or len(rows) > 1:
                product = functional.linear(rows, matrix, self.bias)
            else:
                # A compiler fuses a sum with its terms, so codes are read once and no matrix is written.
                product = (matrix * rows).sum(-1)[None]
                product = product if self.bias is None else product + self.bias
        else:
            tile = partial(self.dequantize, dtype=x.dtype)
            product = tiled_product(rows, self.out_features, tile, self.bias)
        return product.view(*x.shape[:-1], self.out_features)


def row_ranges(out_features: int, in_features: int) -> Iterator[tuple[int, int]]:
    """Return first row and last row (exclusive) of each chunk of a matrix."""
    step = chunk_rows(out_features, in_features)
    return ((start, min(start + step, out_features)) for start in range(0, out_features, step))


def chunks(matrix: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `row_ranges` with a float32 copy of each chunk."""
    for start, end in row_ranges(*matrix.shape):
        yield start, end, matrix[start:end].to(torch.float32, copy=True)
