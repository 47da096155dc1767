"""Times of matrix products on a GPU, by format and number of rows.

A kernel reads the stored bytes at its share of the memory's rate, or at a rate of its own that no faster memory lifts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from qwen_vram.arithmetic.tiling import FUSED_ROWS, UNPACK_FROM_ROWS
from qwen_vram.arithmetic.weights import block_bytes, head_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile

# How a format's matrices are multiplied: by 16-bit products, bitsandbytes' 4-bit or 8-bit kernels, tinygemm, by
# dequantized tiles, or by another library's kernel.
Kind = Literal["dense", "bnb4", "bnb8", "int4", "wide", "other"]

_SIXTEEN_BIT = 2


class Kernel(NamedTuple):
    """A kernel for few rows: seconds beside the bytes, and the most bytes that it reads in a second."""

    start: float
    most: float


# From products of Qwen2.5-7B and Qwen2.5-0.5B, whose matrices differ 17 times in size: two equations for each kernel.
# measured: NVIDIA H200 and H100, torch 2.11.0+cu130, bitsandbytes 0.50.2, 2026-11-26, benchmarks/results/decode.jsonl
# ("products" of busy_ms).
_KERNELS: dict[Kind, Kernel] = {
    "dense": Kernel(2.9e-6, float("inf")),
    "bnb4": Kernel(4.4e-6, 1.15e12),
    "int4": Kernel(2.3e-6, 1.82e12),
    # No row holds a step whose products of these kinds bind; as 16-bit products.
    "bnb8": Kernel(2.9e-6, float("inf")),
    "wide": Kernel(2.9e-6, float("inf")),
    "other": Kernel(2.9e-6, 1.82e12),
}
# Share of a copy's rate at which a product of one row reads a matrix: 0.88 on an H200, 0.90 on an H100, the same rows.
_READ_SHARE = 0.88
# Rows for which tinygemm takes as long as for one: 23 us for one row, 307 for 64.
# measured: NVIDIA H100, torch 2.11.0, 2026-11-25, benchmarks/results/unpack_rows.jsonl.
_INT4_ROWS = 5
# Share of a copy's rate at which a matrix is dequantized, stored bytes read and 16-bit ones written: int8-wo, of which
# 2,048 tokens took 26 ms more than bf16.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-29, benchmarks/results/auto_plans.jsonl.
_DEQUANTIZED_SHARE = 0.25


class Matrices(NamedTuple):
    """Matrices of one format that are multiplied one after the other."""

    kind: Kind
    number: int
    nbytes: int
    numel: int


def kind_of(name: str) -> Kind:
    """Return how a storage format is multiplied."""
    storage = FORMATS[name]
    if storage.is_dense:
        return "dense"
    if storage.library == "bitsandbytes":
        return "bnb4" if storage.bits == 4 else "bnb8"
    if storage.library == "torch":
        return "int4" if storage.bits == 4 else "wide"
    return "other"


@lru_cache(maxsize=64)
def linear_shapes(architecture: Architecture) -> tuple[tuple[int, int], ...]:
    """The matrices of one decoder layer, (out_features, in_features) each."""
    return tuple((weight.shape[0], weight.shape[1]) for weight in architecture.block if weight.is_linear)


def layer_matrices(architecture: Architecture, profile: Profile) -> Matrices:
    """The matrices of one decoder layer, its norms' few bytes with them."""
    shapes = linear_shapes(architecture)
    numel = sum(rows * columns for rows, columns in shapes)
    return Matrices(kind_of(profile.weights), len(shapes), block_bytes(architecture, profile), numel)


def head_matrix(architecture: Architecture, profile: Profile) -> Matrices:
    """The head."""
    nbytes = head_bytes(architecture, profile)
    return Matrices(kind_of(profile.head_format), 1, nbytes, architecture.head.numel)


def product_seconds(of: Matrices, rows: int, machine: Machine, *, compiled: bool = False) -> float:
    """Seconds of products of `rows` rows with every one of the matrices.

    Args:
        compiled: Torch's compiler dequantizes inside the product.
    """
    kernel = _KERNELS[of.kind]
    start, bandwidth = of.number * kernel.start, machine.device_bandwidth
    multiplying = 2 * of.numel * rows / machine.matmul_rate
    if not _dequantizes(of.kind, rows) or (compiled and of.kind == "wide"):
        reading = of.nbytes / min(_READ_SHARE * bandwidth, kernel.most)
        times = max(1, rows / _INT4_ROWS) if of.kind == "int4" else 1
        return start + max(times * reading, multiplying)
    whole = _SIXTEEN_BIT * of.numel
    dequantizing = (of.nbytes + whole) / (_DEQUANTIZED_SHARE * bandwidth)
    return start + dequantizing + max(whole / (_READ_SHARE * bandwidth), multiplying)


def _dequantizes(kind: Kind, rows: int) -> bool:
    """Tell if a product of so many rows makes the matrix in 16 bits first."""
    if kind in ("bnb4", "bnb8"):
        return rows > FUSED_ROWS
    return kind == "wide" or (kind == "int4" and rows >= UNPACK_FROM_ROWS)
