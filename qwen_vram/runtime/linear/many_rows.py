"""Products of up to 64 rows with matrices in 4 bits, if `many_rows_kernels` applies.

Its functions return `None` if it does not apply. They never wait for the GPU, and allocate only x in the kernel's order
and the results, so a CUDA graph can capture them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vram.arithmetic.tiling import MANY_ROWS, by_many_rows
from qwen_vram.runtime.kernels.fused_ops import kernels_on
from qwen_vram.runtime.linear.few_rows import codes_of
from qwen_vram.spec.formats import QUANT_TYPES

_LOGGER = logging.getLogger(__name__)
# Rows of a matrix up to which there are few programs, and columns from which their warps divide them.
_SHORT = _DEEP = 8_192
# Devices on which the kernel failed in this process.
_BROKEN: set[torch.device] = set()


def multiply_each(linears: Sequence[nn.Module], x: Tensor, added: Tensor | None = None) -> tuple[Tensor, ...] | None:
    """Return the products of matrices with the same rows, (rows, in_features) to (rows, out_features).

    Args:
        added: A tensor that is added to the product of a single matrix.
    """
    if x.dim() != 2 or not by_many_rows(len(x), x.shape[1]) or x.device in _BROKEN:
        return None
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous() or torch.is_grad_enabled():
        return None
    if kernels_on(x.device) is None:
        return None
    from qwen_vram.runtime.linear import many_rows_kernels as kernels
    from qwen_vram.runtime.linear.few_rows_kernels import Matrix

    matrices = []
    for linear in linears:
        codes = codes_of(linear, x)
        if codes is None or codes.storage not in QUANT_TYPES:
            return None
        rows: Any = linear.out_features
        bias: Any = linear.bias
        matrices.append(Matrix(codes.weight, bias, x.new_empty(len(x), rows), rows, codes.scales, added))
    try:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            ordered = kernels.fragments(x)
            for matrix in matrices:
                kernels.multiply(ordered, matrix, kernels.Config(1, _deep(len(x), matrix.rows, x.shape[1])))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler can raise any error
        _BROKEN.add(x.device)
        _LOGGER.warning(
            "products of %d to %d rows with 4-bit matrices dequantize them first, which is slower: Triton cannot "
            "compile this library's kernel (%s)",
            *MANY_ROWS,
            str(error).strip()[:300],
        )
        return None
    return tuple(matrix.out for matrix in matrices)


def _deep(rows: int, out: int, width: int) -> int:
    """Return the number of groups of columns, for `rows` rows of x and a matrix (out, width).

    These are the fastest, or within 10 % of the fastest, for the matrices of Qwen2.5-7B and 2 to 64 rows.
    measured: NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-12-01.
    """
    if out > _SHORT:
        return 2 if rows <= 16 else 1
    return 8 if rows <= 32 or width > _DEEP else 4
