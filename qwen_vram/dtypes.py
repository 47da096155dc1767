"""Table of dtypes: their names in this library, config.json, torch and safetensors."""

from typing import NamedTuple


class Dtype(NamedTuple):
    """One element type.

    Attributes:
        stored: Its name in safetensors files.
        bits: Bits of an element.
        torch: Its name in torch; empty if torch has none.
        name: Its name here, if a model can run in it; empty otherwise.
        config: The names by which config.json can give it as a checkpoint's dtype.
    """

    stored: str
    bits: int
    torch: str = ""
    name: str = ""
    config: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of an element; 0 for one of less than a byte."""
        return self.bits // 8


BF16 = Dtype("BF16", 16, "bfloat16", "bf16", ("bfloat16",))
FP16 = Dtype("F16", 16, "float16", "fp16", ("float16", "half"))
FP32 = Dtype("F32", 32, "float32", "fp32", ("float32", "float"))
FP64 = Dtype("F64", 64, "float64", config=("float64", "double"))
FP8_E4M3 = Dtype("F8_E4M3", 8, "float8_e4m3fn", config=("float8_e4m3fn",))
FP8_E5M2 = Dtype("F8_E5M2", 8, "float8_e5m2", config=("float8_e5m2",))
INT8 = Dtype("I8", 8, "int8", config=("int8",))
UINT8 = Dtype("U8", 8, "uint8", config=("uint8",))
UINT32 = Dtype("U32", 32, "uint32")

# Dtypes that a model can run in.
PLAIN = (BF16, FP16, FP32)
# Dtypes whose elements are numbers by themselves, not codes, and that are read as such.
FLOATS = (*PLAIN, FP64, FP8_E4M3, FP8_E5M2)
# Source: safetensors' format description.
DTYPES = (
    *FLOATS,
    INT8,
    UINT8,
    UINT32,
    Dtype("I64", 64, "int64"),
    Dtype("U64", 64, "uint64"),
    Dtype("I32", 32, "int32"),
    Dtype("I16", 16, "int16"),
    Dtype("U16", 16, "uint16"),
    Dtype("BOOL", 8, "bool"),
    Dtype("C64", 64, "complex64"),
    Dtype("F8_E8M0", 8, "float8_e8m0fnu"),
    Dtype("F6_E2M3", 6),
    Dtype("F6_E3M2", 6),
    Dtype("F4", 4),
)
BY_STORED = {row.stored: row for row in DTYPES}
BY_NAME = {row.name: row for row in PLAIN}
BY_CONFIG = {name: row for row in DTYPES for name in row.config}
