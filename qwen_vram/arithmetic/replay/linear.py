"""Allocations of norms and matrix products in their order, for the replay.

Source of the order: transformers 5.17 and 5.23 (modeling_qwen2.py, modeling_qwen3.py), bitsandbytes 0.50.2 (ops.py of
backends/cuda and default).
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from qwen_vram.arithmetic.replay.trace import Consumer
from qwen_vram.arithmetic.tiling import (
    FUSED_ROWS,
    by_many_rows,
    counts_tiles,
    int8_rows,
    int8_tile_elements,
    tile_rows,
    unpacks,
)
from qwen_vram.arithmetic.weights import format_of
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS, StorageFormat, blocks
from qwen_vram.spec.layers import LayerSpec, Weight
from qwen_vram.spec.profile import Profile

# cuBLAS's workspace (32 MiB) and cuBLASLt's (1 MiB), which torch allocates for the first product that needs them and
# keeps.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-22.
CUBLAS_WORKSPACE = (32 * 2**20, 2**20)

_FP32 = 4
_FP16 = 2


def needs_lt(weight: Weight, layer: LayerSpec, profile: Profile) -> bool:
    """Tell if a product runs on cuBLASLt, as torch's own product with a bias does, which adds it in the same kernel.

    bitsandbytes' int8 adds a bias afterwards. Source: torch 2.11, aten/src/ATen/native/cuda/Blas.cpp; bitsandbytes
    0.50.2, backends/cuda/ops.py. Measured: without it all rows of tests/data/accuracy.jsonl without outlier columns of
    Qwen3, and of tiled int8, allocate 1 MiB less, to 8 KiB (chunked prefill to 64 KiB).
    """
    storage = FORMATS[format_of(weight, profile)]
    return not storage.has_outliers and weight.module in layer.biased


def workspaces(architecture: Architecture, profile: Profile) -> tuple[int, ...]:
    """Bytes of the workspaces that cuBLAS and cuBLASLt keep on a device that runs these layers."""
    lt = any(needs_lt(one, layer, profile) for layer, _ in architecture.kinds for one in layer.linears.values())
    return CUBLAS_WORKSPACE if lt else CUBLAS_WORKSPACE[:1]


class MatrixFacts(NamedTuple):
    """A matrix, its storage format, and `lt`: its products run on cuBLASLt."""

    weight: Weight
    storage: StorageFormat
    lt: bool


@lru_cache(maxsize=256)
def matrix_facts(layer: LayerSpec, profile: Profile) -> Mapping[str, MatrixFacts]:
    """Return the facts of a layer's matrices by the names of their modules."""
    return {
        module: MatrixFacts(weight, FORMATS[format_of(weight, profile)], needs_lt(weight, layer, profile))
        for module, weight in layer.linears.items()
    }


class Products:
    """The allocations of norms and linear layers. Every method returns the block of its result; sizes are bytes."""

    def __init__(self, consumer: Consumer, architecture: Architecture, profile: Profile) -> None:
        self.consumer = consumer
        self.consume(consumer)
        self.architecture = architecture
        self.profile = profile
        self.element = profile.element_bytes
        # Facts of each matrix, read in every layer of every step; by the layer's number, then by the module.
        facts = {layer: matrix_facts(layer, profile) for layer, _ in architecture.kinds}
        self.facts = [facts[layer] for layer in architecture.layers]
        self.head = MatrixFacts(architecture.head, FORMATS[format_of(architecture.head, profile)], lt=False)
        self.warm = False
        self.warm_lt = False
        # The step is a decode step, and captured ones have this library's kernels.
        self.decoding = False
        self.has_steps = profile.captured and not profile.compiled and profile.kernels == "fused"

    def consume(self, consumer: Consumer) -> None:
        """Send the events to a consumer from now on."""
        self.take, self.give = consumer.take, consumer.give
        self.keep, self.drop, self.at = consumer.keep, consumer.drop, consumer.at

    def warm_up(self, lt: bool = False) -> None:
        """Allocate the workspaces of a device's first matrix product and of its first one on cuBLASLt, which stay."""
        if not self.warm:
            self.warm = True
            self.take(CUBLAS_WORKSPACE[0])
        if lt and not self.warm_lt:
            self.warm_lt = True
            self.take(CUBLAS_WORKSPACE[1])

    def replace(self, old: int, new: int) -> int:
        """Free `old`, and return `new`."""
        self.give(old)
        return new

    def norm(self, rows: int, width: int, moment: str = "") -> int:
        """Run RMSNorm through float32, for rows of `width` elements; the heads' norms have the same bytes.

        `moment` has the two float32 tensors. Later sums are at most a few bytes a row larger, and belong to no moment.
        """
        take, give = self.take, self.give
        self.at(moment)
        if self.profile.kernels == "fused":
            return take(rows * width * self.element)
        wide = rows * width * _FP32
        upcast = take(wide)
        squares = take(wide)
        self.at("")
        mean = take(rows * _FP32)
        give(squares)
        shifted = take(rows * _FP32)
        root = take(rows * _FP32)
        give(shifted)
        scaled = take(wide)
        give(root, upcast)
        rounded = take(rows * width * self.element)
        result = take(rows * width * self.element)
        give(rounded, scaled, mean)
        return result

    def linear(self, number: int, name: str, rows: int) -> int:
        """Run the product of a matrix of the layer `number`, by the name of its module."""
        return self.product(name, self.facts[number][name], rows)

    def product(self, module: str, matrix: MatrixFacts, rows: int) -> int:
        """Run a matrix product in the weight's format, and add an adapter's update; return the result."""
        weight = matrix.weight
        self.warm_up(matrix.lt)
        result = self.base_product(weight, matrix.storage, rows)
        if module not in self.architecture.adapted:
            return result
        size = rows * weight.shape[0] * self.element
        update = self.take(size)
        scaled = self.take(size)
        self.give(update)
        total = self.take(size)
        self.give(result, scaled)
        return total

    def base_product(self, weight: Weight, storage: StorageFormat, rows: int) -> int:
        """Run a matrix product in the weight's format."""
        take, give = self.take, self.give
        out = weight.shape[0]
        result_size = rows * out * self.element
        fused = storage.is_bnb_4bit and rows <= FUSED_ROWS
        if self.decoding and self.has_steps and storage.is_bnb_4bit and by_many_rows(rows, weight.shape[1]):
            return self.product_of_many_rows(weight, rows)
        if unpacks(storage, rows):
            return self.unpacked_product(weight, result_size, storage)
        if storage.is_dense or storage.is_weight_only or fused:
            return take(result_size)
        if storage.has_outliers:
            return self.int8_in_pieces(weight, rows) if self.profile.tiles else self.int8_product(weight, rows)
        maxima = []
        if counts_tiles(storage, self.profile, weight.shape, rows):
            if storage.is_double:
                maxima = [take(blocks(weight.numel) * _FP32)]
            result, tile = take(result_size), take(tile_rows(*weight.shape) * weight.shape[1] * self.element)
            give(tile, *maxima)
            return result
        if storage.is_double:
            maxima = [take(blocks(weight.numel) * _FP32) for _ in range(2)]
        dequantized = take(weight.numel * self.element)
        result = take(result_size)
        give(*maxima, dequantized)
        return result

    def product_of_many_rows(self, weight: Weight, rows: int) -> int:
        """Allocate the result, and x in the kernel's order, with its rows padded to a multiple of 8."""
        result = self.take(rows * weight.shape[0] * self.element)
        padded = -(-rows // 8) * 8 * weight.shape[1] * self.element
        padding = [self.take(padded)] if rows % 8 else []
        ordered = self.take(padded)
        self.give(*padding, ordered)
        return result

    def unpacked_product(self, weight: Weight, result_size: int, storage: StorageFormat) -> int:
        """Allocate the result, and the first and largest tile, which int4 fills from two halves of its codes."""
        take, give = self.take, self.give
        elements = tile_rows(*weight.shape) * weight.shape[1]
        result, tile = take(result_size), take(elements * self.element)
        for _ in range(2 if storage.is_tinygemm else 0):
            give(take(elements // 2))
        give(tile)
        return result

    def int8_in_pieces(self, weight: Weight, rows: int) -> int:
        """Run an int8 product in pieces of the rows, one after the other, with outliers in tiles of the matrix."""
        step = int8_rows(*weight.shape)
        if rows <= step:
            return self.int8_piece(weight, rows)
        result = self.take(rows * weight.shape[0] * self.element)
        last = rows % step or step
        # The second piece takes the blocks that the first one freed, and so would all of the same size.
        for size in (*[step] * min(-(-rows // step) - 1, 2), last):
            self.give(self.int8_piece(weight, size))
        return result

    def int8_piece(self, weight: Weight, rows: int) -> int:
        """Run one piece; the buffers for outliers are allocated even if it has no outliers."""
        take, give = self.take, self.give
        scales, codes = self.int8_quantized(rows, weight.shape[1])
        result = self.int8_multiplied(rows, weight.shape[0])
        give(codes)
        elements = int8_tile_elements(*weight.shape)
        inputs = take(rows * weight.shape[1] * self.element)
        tile = [take(elements * size) for size in (1, _FP32, self.element)]
        give(inputs, *tile, scales)
        return result

    def int8_quantized(self, rows: int, inner: int) -> tuple[int, int]:
        """Allocate scales and codes of an input."""
        take, give = self.take, self.give
        half = take(rows * inner * _FP16)
        scales, codes = take(rows * _FP32), take(rows * inner)
        magnitudes = take(rows * inner * _FP16)
        flags = take(rows * inner)
        give(magnitudes)
        give(flags, half)
        return scales, codes

    def int8_multiplied(self, rows: int, out: int) -> int:
        """Multiply codes, and return the product in the model's dtype."""
        product = self.take(rows * out * _FP32)
        rounded = self.take(rows * out * _FP16)
        result = self.take(rows * out * self.element)
        self.give(rounded, product)
        return result

    def int8_product(self, weight: Weight, rows: int) -> int:
        """Run LLM.int8(): quantize the input, separate outlier columns, multiply, add their product."""
        take, give = self.take, self.give
        from qwen_vram.arithmetic.int8_outliers import outlier_columns  # only for this format

        out, inner = weight.shape
        outliers = outlier_columns(weight, rows)
        scales, codes = self.int8_quantized(rows, inner)
        apart = []
        if outliers:
            columns = outliers * out
            apart.append(take(rows * outliers * _FP16))
            stored, raw, scaled = take(columns), take(columns * _FP32), take(columns * _FP32)
            give(raw, stored)
            apart.append(take(columns * _FP16))
            give(scaled)
        result = self.int8_multiplied(rows, out)
        if outliers:
            result = self.replace(result, take(rows * out * self.element))
        give(*apart, codes, scales)
        return result
