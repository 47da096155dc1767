"""Times of matrix products on a GPU, by format and number of rows.

A kernel reads the stored bytes at its share of the memory's rate, or at its own rate, if faster memory does not help.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from qwen_vram.arithmetic.tiling import FUSED_ROWS, unpacks
from qwen_vram.arithmetic.weights import block_bytes, head_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS, KernelName, StorageFormat
from qwen_vram.spec.layers import LayerSpec
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile

_SIXTEEN_BIT = 2


class Kernel(NamedTuple):
    """A kernel for few rows: its seconds without the bytes, and the most bytes that it reads in a second."""

    start: float
    most: float


# From products of Qwen2.5-7B and Qwen2.5-0.5B, whose matrices differ 17 times in size: two equations for each kernel.
# measured: NVIDIA H200 and H100, torch 2.11.0+cu130, bitsandbytes 0.50.2, 2026-11-26, benchmarks/results/decode.jsonl
# ("products" of busy_ms).
_KERNELS: dict[KernelName, Kernel] = {
    "dense": Kernel(2.9e-6, float("inf")),
    "bnb-4bit": Kernel(4.4e-6, 1.15e12),
    "tinygemm": Kernel(2.3e-6, 1.82e12),
    # No measured row has a step that is limited by products of these kinds; they count as 16-bit products.
    "bnb-int8": Kernel(2.9e-6, float("inf")),
    "dequantized": Kernel(2.9e-6, float("inf")),
    "gptqmodel": Kernel(2.9e-6, 1.82e12),
    "plugged": Kernel(2.9e-6, 1.82e12),
}
# Share of a copy's rate at which a product of one row reads a matrix: 0.88 on an H200, 0.90 on an H100, the same rows.
_READ_SHARE = 0.88
# Rows for which tinygemm takes as long as for one: 23 us for one row, 307 for 64.
# measured: NVIDIA H100, torch 2.11.0, 2026-11-25, benchmarks/results/unpack_rows.jsonl.
_INT4_ROWS = 5
# Share of a copy's rate at which a matrix is dequantized: stored bytes are read and 16-bit ones written. 2,048 tokens
# with int8-wo took 26 ms more than with bf16.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-29, benchmarks/results/auto_plans.jsonl.
_DEQUANTIZED_SHARE = 0.25


class Matrices(NamedTuple):
    """Matrices of one format that are multiplied one after the other."""

    storage: StorageFormat
    number: int
    nbytes: int
    numel: int


def mean_of_layers(architecture: Architecture, of: Callable[[LayerSpec], float]) -> float:
    """The mean of `of` over the layers; if all are equal, its value for one."""
    (first, _), *others = architecture.kinds
    if not others:
        return of(first)
    return sum(count * of(layer) for layer, count in architecture.kinds) / len(architecture.layers)


@lru_cache(maxsize=64)
def linear_shapes(layer: LayerSpec) -> tuple[tuple[int, int], ...]:
    """The matrices of a decoder layer, (out_features, in_features) each."""
    return tuple((weight.shape[0], weight.shape[1]) for weight in layer.linears.values())


def layer_matrices(architecture: Architecture, profile: Profile) -> Matrices:
    """The matrices of one decoder layer, with the few bytes of its norms; of the mean layer if layers differ."""
    number = round(mean_of_layers(architecture, lambda layer: len(layer.linears)))
    numel = round(mean_of_layers(architecture, lambda layer: layer.linear_numel))
    return Matrices(FORMATS[profile.weights], number, block_bytes(architecture, profile), numel)


def head_matrix(architecture: Architecture, profile: Profile) -> Matrices:
    """The head's matrix."""
    nbytes = head_bytes(architecture, profile)
    return Matrices(FORMATS[profile.head_format], 1, nbytes, architecture.head.numel)


def product_seconds(of: Matrices, rows: int, machine: Machine, *, compiled: bool = False) -> float:
    """Seconds of the products of `rows` rows with each of the matrices.

    Args:
        compiled: Torch's compiler dequantizes inside the product.
    """
    kernel = _KERNELS[of.storage.kernel]
    start, bandwidth = of.number * kernel.start, machine.device_bandwidth
    multiplying = 2 * of.numel * rows / machine.matmul_rate
    if not _dequantizes(of.storage, rows) or (compiled and of.storage.is_dequantized):
        reading = of.nbytes / min(_READ_SHARE * bandwidth, kernel.most)
        times = max(1, rows / _INT4_ROWS) if of.storage.is_tinygemm else 1
        return start + max(times * reading, multiplying)
    whole = _SIXTEEN_BIT * of.numel
    dequantizing = (of.nbytes + whole) / (_DEQUANTIZED_SHARE * bandwidth)
    return start + dequantizing + max(whole / (_READ_SHARE * bandwidth), multiplying)


def _dequantizes(storage: StorageFormat, rows: int) -> bool:
    """Tell if a product of `rows` rows makes the matrix in 16 bits first."""
    return rows > FUSED_ROWS if storage.is_bnb else unpacks(storage, rows)
