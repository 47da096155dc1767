"""Products of a decode step's rows, by the fastest kernel that applies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qwen_vram.runtime.kernels import fused_ops
from qwen_vram.runtime.linear import few_rows, many_rows


def products(linears: Sequence[nn.Module], rows: Tensor) -> tuple[Tensor, ...]:
    """Return the products of some matrices with the same rows, (rows, in_features)."""
    return _by_kernels(linears, rows) or tuple(linear(rows) for linear in linears)


def add_product(linear: nn.Module, rows: Tensor, hidden: Tensor) -> Tensor:
    """Return `hidden` plus a product, in one launch if possible."""
    by_many = many_rows.multiply_each((linear,), rows, hidden)
    result = few_rows.multiply(linear, rows, hidden) if by_many is None else by_many[0]
    if result is not None:
        return result
    product: Tensor = linear(rows)
    return product.add_(hidden)


def add_mlp(mlp: Any, rows: Tensor, hidden: Tensor) -> Tensor:
    """Return `hidden` plus SwiGLU and the down projection, or plus the module's own result if no kernel applies."""
    inner = few_rows.swiglu(mlp.gate_proj, mlp.up_proj, rows)
    if inner is None:
        both = _by_kernels((mlp.gate_proj, mlp.up_proj), rows)
        inner = None if both is None else fused_ops.multiply_silu(*both)
    if inner is not None:
        return add_product(mlp.down_proj, inner, hidden)
    result: Tensor = mlp(rows)
    return result.add_(hidden)


def _by_kernels(linears: Sequence[nn.Module], rows: Tensor) -> tuple[Tensor, ...] | None:
    found = many_rows.multiply_each(linears, rows)
    return few_rows.multiply_each(linears, rows) if found is None else found
