"""Products of one to eight rows, if a kernel of `few_rows_kernels` applies.

A function returns `None` if they do not apply, and the caller then multiplies without them. The functions never wait
for the GPU and allocate only the result, so a CUDA graph can capture them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen_vram.runtime.kernels.fused_ops import kernels_on
from qwen_vram.spec.formats import BLOCK, FORMATS, NESTED_BLOCK, QUANT_TYPES

_LOGGER = logging.getLogger(__name__)

MOST_ROWS = 8
# Name of a 16-bit matrix's format in these kernels.
_DENSE = "dense"
# The limit for a 16-bit matrix, which cuBLAS multiplies by two rows in the time of one.
_MOST_DENSE_ROWS = 1

# The look-up of 16 values and the division of products (`_division`): a few of the divisions that
# benchmarks/few_rows.py tried, which serve all shapes. With one row of Qwen2.5-7B they are within 10 % of the
# fastest, except for matrices of 512 rows, which are multiplied together with others.
# measured: NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30.
_LOOKUP = "shuffle"
_DEEP = 8_192  # columns: from this number on a program's warps share a row
_SHORT = 8_192  # rows: up to this number there are few programs

# Formats whose kernels failed in this process.
_BROKEN: set[str] = set()


class Codes(NamedTuple):
    """The tensors of a matrix that a kernel reads, and its storage format."""

    storage: str
    nested: bool
    weight: Tensor
    scales: tuple[Tensor, ...]


def multiply(linear: nn.Module, x: Tensor, added: Tensor | None = None) -> Tensor | None:
    """Return `x @ matrix.T + bias`, (rows, in_features) to (rows, out_features), with `added` of that shape added."""
    read = _read((linear,), x, added)
    if read is None:
        return None
    kernels, (matrix,), storage = read
    config = _config(kernels, storage, len(x), matrix.rows, x.shape[1], alone=True)
    ran = _launch(storage, x, lambda: kernels.multiply(x, (matrix,), storage, config))
    return matrix.out if ran else None


def multiply_each(linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    """Return the products of up to three matrices of one format with the same rows, in one launch for one row."""
    if len(x) > 1:  # such launches of several matrices have not been measured
        each = [multiply(linear, x) for linear in linears]
        found = tuple(one for one in each if one is not None)
        return found if len(found) == len(each) else None
    read = _read(linears, x)
    if read is None:
        return None
    kernels, matrices, storage = read
    rows = sum(one.rows for one in matrices)
    config = _config(kernels, storage, len(x), rows, x.shape[1], alone=False)
    ran = _launch(storage, x, lambda: kernels.multiply(x, matrices, storage, config))
    return tuple(one.out for one in matrices) if ran else None


def swiglu(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor | None:
    """Return `silu(x @ gate.T) * (x @ up.T)` of one row, for matrices of one shape without biases, in one launch."""
    if len(x) > 1 or getattr(gate, "bias", None) is not None or gate.out_features != up.out_features:
        return None
    read = _read((gate, up), x)
    if read is None:
        return None
    kernels, (one, other), storage = read
    config = _config(kernels, storage, len(x), one.rows, x.shape[1], alone=False)
    ran = _launch(storage, x, lambda: kernels.swiglu(x, one, other, storage, config))
    return one.out if ran else None


def _launch(storage: str, x: Tensor, run: Callable[[], None]) -> bool:
    """Launch a kernel, and tell if it ran. A kernel that this machine's Triton cannot compile is not tried again."""
    try:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler can raise any error
        _BROKEN.add(storage)
        _LOGGER.warning(
            "products of few rows with %s matrices go by other kernels, which are slower: Triton cannot compile this "
            "library's (%s)",
            storage,
            str(error).strip()[:300],
        )
        return False
    return True


def _read(
    linears: Sequence[nn.Module], x: Tensor, added: Tensor | None = None
) -> tuple[Any, tuple[Any, ...], str] | None:
    """Return the kernels, the matrices with their results, and the format; `None` if the kernels do not apply."""
    fits = x.dim() == 2 and 0 < len(x) <= MOST_ROWS and x.dtype in (torch.bfloat16, torch.float16)
    if not (fits and x.is_contiguous() and _aligned(x)) or (torch.is_grad_enabled() and x.requires_grad):
        return None
    codes: list[Codes] = []
    for linear in linears:
        one = codes_of(linear, x)
        if one is None or (codes and one[:2] != codes[0][:2]) or (linear.bias is None) != (linears[0].bias is None):
            return None
        codes.append(one)
    kernels = kernels_for(x.device, codes[0].storage)
    if kernels is None or codes[0].storage in _BROKEN:
        return None
    matrices = []
    for one, linear in zip(codes, linears, strict=True):
        rows: Any = linear.out_features
        matrices.append(kernels.Matrix(one.weight, linear.bias, x.new_empty(len(x), rows), rows, one.scales, added))
    return kernels, tuple(matrices), codes[0].storage


def codes_of(linear: Any, x: Tensor) -> Codes | None:
    """Return the tensors of a layer's matrix, if the kernels support it and its call does nothing else."""
    if not isinstance(linear, nn.Linear) or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    weight = linear.weight
    if "forward" in vars(linear) or weight.device != x.device or not weight.is_contiguous() or not _aligned(weight):
        return None
    if type(linear) is nn.Linear:
        if len(x) > _MOST_DENSE_ROWS or weight.dtype != x.dtype or x.shape[1] != weight.shape[1] or x.shape[1] % 8:
            return None
        return Codes(_DENSE, False, weight.view(-1).view(torch.int32), (weight,))
    storage = getattr(linear, "format", None)
    if storage is not None and FORMATS[storage].few_rows:
        if x.shape[1] != linear.in_features or x.shape[1] % 16:
            return None
        levels: Any = getattr(linear, str(linear.scales))
        if _is_int4(storage):
            levels = levels.view(-1).view(torch.int32)
        return Codes(str(storage), False, weight.view(-1).view(torch.int32), (levels,))
    state = getattr(weight, "quant_state", None)
    if (
        state is None
        or weight.dtype != torch.uint8
        or state.quant_type not in QUANT_TYPES
        or state.blocksize != BLOCK
        or state.shape[1] != x.shape[1]
        or x.shape[1] % BLOCK
        or state.code.dtype != torch.float32
        or getattr(state, "packing_format_for_cpu", False)
    ):
        return None
    scales: tuple[Tensor, ...] = (state.absmax, state.code)
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCK:
            return None
        scales = (*scales, state.state2.code, state.state2.absmax, state.offset)
    return Codes(state.quant_type, state.nested, weight.view(-1).view(torch.int32), scales)


@lru_cache(maxsize=16)
def kernels_for(device: torch.device, storage: str) -> ModuleType | None:
    """Return the kernels of a storage format, if Triton runs on `device`."""
    if kernels_on(device) is None:
        return None
    from qwen_vram.runtime.linear import few_rows_kernels, int4_kernels

    return int4_kernels if _is_int4(storage) else few_rows_kernels


def _config(kernels: Any, storage: str, rows: int, out: int, width: int, *, alone: bool) -> Any:
    """Return the division of a product and the look-up; the arguments are those of `_division`."""
    if _is_int4(storage):
        *division, ahead = _int4_division(rows, out, width, alone=alone)
        return kernels.Config(*division, ahead=ahead)
    return kernels.Config(*_division(storage, rows, out, width, alone=alone), _LOOKUP)


def _int4_division(rows: int, out: int, width: int, *, alone: bool) -> tuple[int, int, int, int]:
    """Return the same for int4, with the number of steps between a load and its product.

    measured: as above, 2026-12-01.
    """
    if width > _DEEP:
        return (16, 16, 16, 1) if rows == 1 else (16, 8, 8, 2)
    if out <= _SHORT:
        return (16, 4, 4, 3)
    if rows > 1:
        return (32, 2, 2, 2)
    return (32, 2, 2, 1) if alone else (16, 2, 2, 1)


def _division(storage: str, rows: int, out: int, width: int, *, alone: bool) -> tuple[int, int, int]:
    """Return the division of a product: rows of the matrix per program, chunks of 16 bytes per step, and warps.

    Args:
        rows: Rows of x.
        out: Rows of the matrices together.
        alone: There is one matrix, and the kernel computes only its product.
    """
    if storage == _DENSE:
        return (2, 128, 4)
    if rows > 4:
        return (2, 32, 1)
    if width > _DEEP:
        return (4, 128, 4) if rows > 1 or storage in QUANT_TYPES else (2, 128, 4)
    if rows > 1 or out > _SHORT:
        return (4, 32, 1)
    if storage in QUANT_TYPES:
        return (4, 64, 2) if alone else (4, 32, 1)
    return (2, 128, 4)


def _is_int4(storage: str) -> bool:
    """Tell if codes are in the order of torch's tinygemm kernel."""
    return storage != _DENSE and FORMATS[storage].is_tinygemm


def _aligned(tensor: Tensor) -> bool:
    """Tell if the tensor begins at an address that the kernels' loads of 16 bytes allow."""
    return tensor.data_ptr() % 16 == 0
