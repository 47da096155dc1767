"""Storage formats: the bytes of a weight as sums that are checked by eye.

It does not import torch or the library that writes a format. `runtime.backends` finds that library by the format's
name. A test compares every sum with the storages that the real library makes.
"""

from typing import Literal, NamedTuple

from qwen_vram.dtypes import BF16, FP16, FP32
from qwen_vram.errors import ConfigError, UnknownNameError

FormatName = Literal[
    "fp32", "bf16", "fp16", "int8", "nf4", "nf4-plain", "fp4", "fp4-plain", "gptq-int4", "gptq-int8", "int4", "int8-wo",
    "fp8", "gptq", "awq", "fp8-block", "compressed-tensors",
]  # fmt: skip
Of = Literal["weights", "rows", "columns", "row_groups", "tensor"]
# The kernels that multiply by a matrix. In order: 16- or 32-bit products, bitsandbytes' 4-bit and 8-bit kernels,
# torch's own int4 kernel, tiles that torch's operators dequantize, GPTQModel's, and a backend of another package.
KernelName = Literal["dense", "bnb-4bit", "bnb-int8", "tinygemm", "dequantized", "gptqmodel", "plugged"]

# torch's caching allocator hands out multiples of this. Source: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize.
ALLOCATION_STEP = 512

# bitsandbytes' 4-bit layout: BLOCK weights share a block maximum. With double quantization the maxima are quantized
# too, and NESTED_BLOCK of them share a maximum. A table of codes has 16 or 256 values in float32.
# Source: bitsandbytes 0.50.2, functional.py, quantize_4bit (blocksize=64), quantize_blockwise and QuantState.
BLOCK = 64
NESTED_BLOCK = 256
QUANT_TYPES = ("nf4", "fp4")
# Rows that share a block of the CPU's 4-bit kernel. Source: bitsandbytes 0.50.2, functional.py,
# _convert_weight_packed_for_cpu (block_n).
PACKED_ROWS = 32
_CODE_TABLE = 16 * FP32.nbytes
_NESTED_CODE_TABLE = 256 * FP32.nbytes


class Part(NamedTuple):
    """One stored tensor of a format: `nbytes` bytes for every `per` units of `of`, the last group rounded up."""

    name: str
    nbytes: int
    per: int
    of: Of


class StorageFormat(NamedTuple):
    """The storage of a matrix of shape `(rows, columns)`.

    Attributes:
        parts: The stored tensors, in storage order; empty if only a checkpoint's headers state them.
        bits: Code bits per weight, without scales; 0 if only a checkpoint's headers state them.
        kernel: The kernel that multiplies by it.
        group_size: Weights of a row that share a scale; 0 if a format has no such groups.
        few_rows: This library's own kernels multiply one to eight rows by it on a GPU.
        multiples: Numbers that must divide a matrix's rows and columns.
    """

    name: str
    parts: tuple[Part, ...]
    bits: int
    kernel: KernelName
    group_size: int = 0
    multiples: tuple[int, int] = (1, 1)
    few_rows: bool = False

    @property
    def is_dense(self) -> bool:
        """Tell if it is a plain dtype that needs no dequantization."""
        return self.kernel == "dense"

    @property
    def is_16_bit(self) -> bool:
        """Tell if it is a plain dtype of 16 bits."""
        return self.is_dense and self.bits == 16

    @property
    def is_bnb_4bit(self) -> bool:
        """Tell if bitsandbytes' 4-bit kernels multiply by it."""
        return self.kernel == "bnb-4bit"

    @property
    def has_outliers(self) -> bool:
        """Tell if products separate outlier columns of the input, and wait for their count (bitsandbytes' int8)."""
        return self.kernel == "bnb-int8"

    @property
    def is_bnb(self) -> bool:
        """Tell if bitsandbytes writes and runs it."""
        return self.is_bnb_4bit or self.has_outliers

    @property
    def is_tinygemm(self) -> bool:
        """Tell if torch's own int4 kernel multiplies by it, and tiles are dequantized for many rows only."""
        return self.kernel == "tinygemm"

    @property
    def is_dequantized(self) -> bool:
        """Tell if torch's operators dequantize it in tiles for products of any number of rows."""
        return self.kernel == "dequantized"

    @property
    def is_weight_only(self) -> bool:
        """Tell if it runs on torch's own operators."""
        return self.is_tinygemm or self.is_dequantized

    @property
    def is_gptqmodel(self) -> bool:
        """Tell if GPTQModel runs it: it loads as it is stored, and no checkpoint is quantized to it at load."""
        return self.kernel == "gptqmodel"

    @property
    def is_awq(self) -> bool:
        """Tell if AWQ made its codes."""
        return self.name == "awq"

    @property
    def needs_calibration(self) -> bool:
        """Tell if its codes depend on sample texts."""
        return self.is_gptqmodel and bool(self.parts)

    @property
    def is_quantized_on_load(self) -> bool:
        """Tell if a 16-bit checkpoint is quantized to it at load. Its sums then give every matrix's bytes."""
        return self.is_bnb or self.is_weight_only

    @property
    def is_double(self) -> bool:
        """Tell if block maxima are quantized too (double quantization of bitsandbytes)."""
        return any(part.name == "offset" for part in self.parts)

    @property
    def is_float(self) -> bool:
        """Tell if codes of one byte are floating-point numbers."""
        return self.name == "fp8"

    @property
    def multiplies_fp8(self) -> bool:
        """Tell if servers multiply by it in 8-bit floating point, on cards that can."""
        return self.name in ("fp8", "fp8-block")

    @property
    def streams(self) -> bool:
        """Tell if layers in it can stay off the device: their backend defines how they are moved."""
        return self.is_dense or self.is_bnb

    @property
    def is_plugged(self) -> bool:
        """Tell if this library counts it and only another package's backend would load it."""
        return self.kernel == "plugged"

    @property
    def library(self) -> str:
        """The library that writes and runs it; empty for plain dtypes, and for formats that no backend here runs."""
        return "bitsandbytes" if self.is_bnb else "torch" if self.is_weight_only else "gptqmodel" * self.is_gptqmodel

    @property
    def quant_type(self) -> str:
        """Bitsandbytes' name of its 4-bit codes, without the suffix for the stored scales."""
        return self.name.removesuffix("-plain")

    def part_sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes of each part for a tensor of `shape`, `(rows, columns)` or one dimension. Exact.

        Raises:
            ConfigError: only a checkpoint's headers state the format's bytes, or the format does not allow this shape.
        """
        if not self.parts:
            raise ConfigError(
                f"{self.name!r} is a format that checkpoints are published in, with bits and groups of their own, got "
                "it for a model that is not stored so; pass such a checkpoint, or choose from "
                f"{', '.join(name for name, row in FORMATS.items() if row.parts)}"
            )
        rows, columns = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
        if len(shape) == 2 and (rows % self.multiples[0] or columns % self.multiples[1]):
            raise ConfigError(
                f"{self.name!r} stores matrices whose rows are a multiple of {self.multiples[0]} and whose columns are "
                f"one of {self.multiples[1]}, got {rows:,} x {columns:,}; use 'nf4', which has no such limit"
            )
        group = self.group_size or columns
        counts = {
            "weights": rows * columns,
            "rows": rows,
            "columns": columns,
            "row_groups": rows * -(-columns // group),
            "tensor": 1,
        }
        return tuple(-(-counts[part.of] // part.per) * part.nbytes for part in self.parts)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts together. Exact.

        >>> FORMATS["nf4"].nbytes((18944, 3584))
        35026180
        """
        return sum(self.part_sizes(shape))

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Bytes of each part by its name. Exact."""
        return dict(zip((part.name for part in self.parts), self.part_sizes(shape), strict=True))


def blocks(numel: int) -> int:
    """Return the blocks of bitsandbytes' 4-bit layout that hold `numel` weights."""
    return -(-numel // BLOCK)


def is_packed(shape: tuple[int, ...]) -> bool:
    """Tell if the CPU's 4-bit kernel accepts a matrix of this shape, (rows, columns)."""
    return shape[0] % PACKED_ROWS == 0 and shape[1] % BLOCK == 0


_CODES4 = Part("weight", 1, 2, "weights")  # two 4-bit codes a byte
_CODE = Part("code", _CODE_TABLE, 1, "tensor")
_DOUBLE = (
    _CODES4,
    Part("absmax", 1, BLOCK, "weights"),
    Part("state2.absmax", FP32.nbytes, BLOCK * NESTED_BLOCK, "weights"),
    Part("state2.code", _NESTED_CODE_TABLE, 1, "tensor"),
    Part("offset", FP32.nbytes, 1, "tensor"),
    _CODE,
)
_SINGLE = (_CODES4, Part("absmax", FP32.nbytes, BLOCK, "weights"), _CODE)

FORMATS: dict[str, StorageFormat] = {
    row.name: row
    for row in (
        *(
            StorageFormat(dtype.name, (Part("weight", dtype.nbytes, 1, "weights"),), dtype.bits, "dense")
            for dtype in (FP32, BF16, FP16)
        ),
        StorageFormat("int8", (Part("weight", 1, 1, "weights"), Part("SCB", 4, 1, "rows")), 8, "bnb-int8"),
        StorageFormat("nf4", _DOUBLE, 4, "bnb-4bit", few_rows=True),
        StorageFormat("nf4-plain", _SINGLE, 4, "bnb-4bit", few_rows=True),
        StorageFormat("fp4", _DOUBLE, 4, "bnb-4bit", few_rows=True),
        StorageFormat("fp4-plain", _SINGLE, 4, "bnb-4bit", few_rows=True),
        # AutoGPTQ's layout, which GPTQModel writes too: int32 words, fp16 scales, one int32 a column for its group.
        StorageFormat(
            "gptq-int4",
            (
                Part("qweight", 1, 2, "weights"),
                Part("qzeros", 1, 2, "row_groups"),
                Part("scales", 2, 1, "row_groups"),
                Part("g_idx", 4, 1, "columns"),
            ),
            4,
            "gptqmodel",
            128,
        ),
        StorageFormat(
            "gptq-int8",
            (
                Part("qweight", 1, 1, "weights"),
                Part("qzeros", 1, 1, "row_groups"),
                Part("scales", 2, 1, "row_groups"),
                Part("g_idx", 4, 1, "columns"),
            ),
            8,
            "gptqmodel",
            128,
        ),
        # tinygemm: scale and zero in bf16 side by side. Source: torch's _weight_int4pack_mm, on the CPU too.
        StorageFormat(
            "int4",
            (_CODES4, Part("scales_and_zeros", 4, 1, "row_groups")),
            4,
            "tinygemm",
            128,
            (16, 128),
            few_rows=True,
        ),
        StorageFormat(
            "int8-wo", (Part("weight", 1, 1, "weights"), Part("scale", 2, 1, "rows")), 8, "dequantized", few_rows=True
        ),
        StorageFormat(
            "fp8", (Part("weight", 1, 1, "weights"), Part("scale", 4, 1, "rows")), 8, "dequantized", few_rows=True
        ),
        # Formats of published checkpoints: bits, groups and skipped modules vary, so headers give the bytes (`stored`).
        StorageFormat("gptq", (), 0, "gptqmodel"),
        StorageFormat("awq", (), 0, "gptqmodel"),
        StorageFormat("fp8-block", (), 0, "plugged"),
        StorageFormat("compressed-tensors", (), 0, "plugged"),
    )
}
FORMAT_NAMES = tuple(FORMATS)


def storage_format(name: str) -> StorageFormat:
    """The storage format called `name`.

    Raises:
        UnknownNameError: no format has this name.
    """
    if name not in FORMATS:
        raise UnknownNameError("storage format", name, FORMAT_NAMES)
    return FORMATS[name]
