"""Storage formats: the bytes of a weight as sums that are checked by eye.

Knows nothing of torch or of the library that writes a format; `runtime.backends` joins the two by the format's name,
and a test holds every sum against the storages that the real library makes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from qwen_vram.errors import ConfigError, UnknownNameError

FormatName = Literal[
    "fp32", "bf16", "fp16", "int8", "nf4", "nf4-plain", "fp4", "fp4-plain", "gptq-int4", "gptq-int8", "int4", "int8-wo",
    "fp8", "gptq", "awq", "fp8-block", "compressed-tensors",
]  # fmt: skip
Of = Literal["weights", "rows", "columns", "row_groups", "tensor"]

# torch's caching allocator hands out multiples of this. Source: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize.
ALLOCATION_STEP = 512


class Part(NamedTuple):
    """One stored tensor of a format: `nbytes` for every `per` of what it counts, the last one rounded up."""

    name: str
    nbytes: int
    per: int
    of: Of


class StorageFormat(NamedTuple):
    """How a matrix of shape `(rows, columns)` is stored.

    Attributes:
        parts: What is stored, in storage order; empty where only a checkpoint's headers say it.
        bits: Code bits per weight, scales not counted; 0 where only a checkpoint's headers say it.
        group_size: Weights that share a scale, where they do so along a row; 0 otherwise.
        library: The library that writes and runs it; empty for plain dtypes.
        multiples: What a matrix's rows and columns must be multiples of.
    """

    name: str
    parts: tuple[Part, ...]
    bits: int
    group_size: int = 0
    library: str = ""
    multiples: tuple[int, int] = (1, 1)

    @property
    def is_dense(self) -> bool:
        """Tell if it is a plain dtype that needs no dequantization."""
        return not self.library

    @property
    def is_double(self) -> bool:
        """Tell if block maxima are quantized too (double quantization of bitsandbytes)."""
        return any(part.name == "offset" for part in self.parts)

    @property
    def streams(self) -> bool:
        """Tell if layers in it can stay off the device: their backend says how they are moved."""
        return self.library in ("", "bitsandbytes")

    @property
    def is_plugged(self) -> bool:
        """Tell if this library counts it and another package's backend would load it."""
        return self.library in ("kernels", "compressed-tensors")

    def part_sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes of each part for a tensor of `shape`, `(rows, columns)` or one dimension. Exact.

        Raises:
            ConfigError: a format whose bytes only a checkpoint's headers say, or that has no place for such a matrix.
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


_CODES4 = Part("weight", 1, 2, "weights")  # two 4-bit codes a byte
# bitsandbytes, block of 64 weights; double quantization stores the block maxima in 8 bits, 256 to a block of their own.
# Source: bitsandbytes 0.50.2 functional.py, quantize_4bit (blocksize=64) and QuantState.
_CODE = Part("code", 64, 1, "tensor")  # 16 x fp32
_DOUBLE = (
    _CODES4,
    Part("absmax", 1, 64, "weights"),
    Part("state2.absmax", 4, 64 * 256, "weights"),
    Part("state2.code", 1024, 1, "tensor"),  # 256 x fp32
    Part("offset", 4, 1, "tensor"),
    _CODE,
)
_SINGLE = (_CODES4, Part("absmax", 4, 64, "weights"), _CODE)

FORMATS: dict[str, StorageFormat] = {
    row.name: row
    for row in (
        StorageFormat("fp32", (Part("weight", 4, 1, "weights"),), 32),
        StorageFormat("bf16", (Part("weight", 2, 1, "weights"),), 16),
        StorageFormat("fp16", (Part("weight", 2, 1, "weights"),), 16),
        StorageFormat("int8", (Part("weight", 1, 1, "weights"), Part("SCB", 4, 1, "rows")), 8, 0, "bitsandbytes"),
        StorageFormat("nf4", _DOUBLE, 4, 0, "bitsandbytes"),
        StorageFormat("nf4-plain", _SINGLE, 4, 0, "bitsandbytes"),
        StorageFormat("fp4", _DOUBLE, 4, 0, "bitsandbytes"),
        StorageFormat("fp4-plain", _SINGLE, 4, 0, "bitsandbytes"),
        # AutoGPTQ's layout, which GPTQModel writes too: int32 words, fp16 scales, one int32 a column for the order.
        StorageFormat(
            "gptq-int4",
            (
                Part("qweight", 1, 2, "weights"),
                Part("qzeros", 1, 2, "row_groups"),
                Part("scales", 2, 1, "row_groups"),
                Part("g_idx", 4, 1, "columns"),
            ),
            4,
            128,
            "gptqmodel",
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
            128,
            "gptqmodel",
        ),
        # tinygemm: scale and zero in bf16 side by side. Source: torch's _weight_int4pack_mm, on the CPU too.
        StorageFormat("int4", (_CODES4, Part("scales_and_zeros", 4, 1, "row_groups")), 4, 128, "torch", (16, 128)),
        StorageFormat("int8-wo", (Part("weight", 1, 1, "weights"), Part("scale", 2, 1, "rows")), 8, 0, "torch"),
        StorageFormat("fp8", (Part("weight", 1, 1, "weights"), Part("scale", 4, 1, "rows")), 8, 0, "torch"),
        # What checkpoints are published in: bits, groups and skipped modules vary, so headers say the bytes (`stored`).
        StorageFormat("gptq", (), 0, 0, "gptqmodel"),
        StorageFormat("awq", (), 0, 0, "gptqmodel"),
        StorageFormat("fp8-block", (), 0, 0, "kernels"),
        StorageFormat("compressed-tensors", (), 0, 0, "compressed-tensors"),
    )
}
FORMAT_NAMES = tuple(FORMATS)


def storage_format(name: str) -> StorageFormat:
    """The storage format called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in FORMATS:
        raise UnknownNameError("storage format", name, FORMAT_NAMES)
    return FORMATS[name]
