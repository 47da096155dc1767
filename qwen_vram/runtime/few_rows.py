"""Products of one to eight rows with quantized matrices: where the kernels of `few_rows_kernels` make them.

Each function returns `None` where they do not apply, and the caller multiplies as it would without them. Nothing here
waits for the GPU or allocates more than the result, so that it may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen_vram.runtime.elementwise import kernels_on
from qwen_vram.runtime.row_linear import Fp8Linear, Int8Linear

MOST_ROWS = 8
_BLOCK = 64  # of bitsandbytes' 4-bit matrices, for its kernel and for these
_OUTER_BLOCK = 256  # of the maxima of blocks. Source: bitsandbytes 0.50.2, functional.quantize_blockwise

# How 16 values are looked up. Not measured yet, as the divisions below: benchmarks/few_rows.py chooses them.
_LOOKUP = "shuffle"
# Rows of the matrix for a program, chunks of 16 bytes a step, warps; by rows of x, at most.
_DIVISIONS = {1: (4, 32, 1), 4: (4, 32, 1), MOST_ROWS: (2, 32, 1)}


class _Codes(NamedTuple):
    """What a kernel reads of a matrix, and the format that it is in."""

    storage: str
    nested: bool
    weight: Tensor
    scales: tuple[Tensor, ...]


def multiply(linear: nn.Module, x: Tensor) -> Tensor | None:
    """`x @ matrix.T + bias`: (rows, in_features) to (rows, out_features)."""
    products = multiply_each((linear,), x)
    return None if products is None else products[0]


def multiply_each(linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    """The products of up to three matrices of one format with the same rows, in one launch."""
    read = _read(linears, x)
    if read is None:
        return None
    kernels, matrices, storage = read
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernels.multiply(x, matrices, storage, kernels.Config(*_division(len(x)), _LOOKUP))
    return tuple(one.out for one in matrices)


def swiglu(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor | None:
    """`silu(x @ gate.T) * (x @ up.T)` of two matrices of one shape without biases, in one launch."""
    if getattr(gate, "bias", None) is not None or gate.out_features != up.out_features:
        return None
    read = _read((gate, up), x)
    if read is None:
        return None
    kernels, (one, other), storage = read
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernels.swiglu(x, one, other, storage, kernels.Config(*_division(len(x)), _LOOKUP))
    result: Tensor = one.out
    return result


def _read(linears: Sequence[nn.Module], x: Tensor) -> tuple[Any, tuple[Any, ...], str] | None:
    """The kernels, and the matrices with their results; `None` where the kernels do not apply."""
    fits = x.dim() == 2 and 0 < len(x) <= MOST_ROWS and x.dtype in (torch.bfloat16, torch.float16)
    if not (fits and x.is_contiguous() and _aligned(x)) or (torch.is_grad_enabled() and x.requires_grad):
        return None
    codes: list[_Codes] = []
    for linear in linears:
        one = _codes(linear, x)
        if one is None or (codes and one[:2] != codes[0][:2]) or (linear.bias is None) != (linears[0].bias is None):
            return None
        codes.append(one)
    kernels = kernels_for(x.device)
    if kernels is None:
        return None
    matrices = []
    for one, linear in zip(codes, linears, strict=True):
        rows: Any = linear.out_features
        matrices.append(kernels.Matrix(one.weight, linear.bias, x.new_empty(len(x), rows), rows, one.scales))
    return kernels, tuple(matrices), codes[0].storage


def _codes(linear: Any, x: Tensor) -> _Codes | None:
    """What is read of a layer's matrix, if the kernels know it."""
    weight = getattr(linear, "weight", None)
    if weight is None or weight.device != x.device or not weight.is_contiguous() or not _aligned(weight):
        return None
    if isinstance(linear, (Int8Linear, Fp8Linear)):
        if x.shape[1] != linear.in_features or x.shape[1] % 16:
            return None
        return _Codes(linear.format, False, weight.view(-1).view(torch.int32), (linear.scale,))
    state = getattr(weight, "quant_state", None)
    if (
        state is None
        or weight.dtype != torch.uint8
        or state.quant_type not in ("nf4", "fp4")
        or state.blocksize != _BLOCK
        or state.shape[1] != x.shape[1]
        or x.shape[1] % _BLOCK
        or getattr(state, "packing_format_for_cpu", False)
    ):
        return None
    scales: tuple[Tensor, ...] = (state.absmax, state.code)
    if state.nested:
        if state.state2.blocksize != _OUTER_BLOCK:
            return None
        scales = (*scales, state.state2.code, state.state2.absmax, state.offset)
    return _Codes(state.quant_type, state.nested, weight.view(-1).view(torch.int32), scales)


@lru_cache(maxsize=16)
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels, if Triton runs on `device`."""
    if kernels_on(device) is None:
        return None
    from qwen_vram.runtime import few_rows_kernels

    return few_rows_kernels


def _division(rows: int) -> tuple[int, int, int]:
    return next(division for most, division in _DIVISIONS.items() if rows <= most)


def _aligned(tensor: Tensor) -> bool:
    """Begins where the kernels' loads of 16 bytes may."""
    return tensor.data_ptr() % 16 == 0
