"""A matrix as each library stores it: the tensors that belong together, their dtypes, shapes and bytes once loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors.quantized_names import FLOATS
from qwen_vram.dtypes import BY_STORED, INT8, PLAIN, UINT8
from qwen_vram.spec.architecture import Weight
from qwen_vram.spec.formats import FORMATS, NESTED_BLOCK, QUANT_TYPES, FormatName
from qwen_vram.spec.prequantized import StoredTensor
from qwen_vram.spec.quantization import (
    AWQ,
    BITSANDBYTES,
    BLOCK_FP8,
    GPTQ,
    OWN_METHOD,
    four_bit_format,
    method_of,
    settings_of,
)

# Bytes of what runs in the model's own dtype, which is one of 16 bits beside quantized matrices.
HALF = 2
# bitsandbytes stores the offset of double quantization in a JSON text, and keeps it as one float32.
_OFFSET = 4
# Sizes of a block of weights that shares a maximum. Source: bitsandbytes 0.50.2, functional.py, quantize_4bit.
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Dtypes that 4-bit codes are stored in (bnb_4bit_quant_storage).
_STORAGE = tuple(row.stored for row in (UINT8, INT8, *PLAIN))
_WORD = 32
_AWQ_CODES = 8  # of 4 bits in a word


class Part(NamedTuple):
    """One tensor of a stored matrix, as it should be.

    Attributes:
        name: Its name in the checkpoint.
        dtypes: Dtypes that it may have, as safetensors spells them.
        shapes: Shapes that it may have; empty if any will do that is not empty.
        kept: Bytes of it that the loaded model keeps; `None` is as many as it has in the file.
        optional: It may be missing; then nothing of it is loaded, or it is made, of `kept` bytes.
    """

    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    kept: int | None = None
    optional: bool = False

    def fits(self, tensor: Tensor) -> bool:
        """Tell if `tensor` can be this part."""
        shaped = tensor.shape in self.shapes if self.shapes else tensor.nbytes > 0
        return tensor.dtype in self.dtypes and shaped

    def loaded(self, tensors: Mapping[str, Tensor]) -> StoredTensor | None:
        """The tensor that the loaded model has of it; `None` if it has none."""
        held = tensors.get(self.name)
        kept = self.kept if self.kept is not None or held is None else held.nbytes
        return StoredTensor(self.name, kept) if kept else None


class Matrix(NamedTuple):
    """How a matrix is stored: `format` is `None` for a plain dtype, and `parts` are all of its tensors."""

    format: FormatName | None
    parts: tuple[Part, ...]


def matrix_of(weight: Weight, quantization: object, tensors: Mapping[str, Tensor]) -> Matrix:
    """How the checkpoint stores `weight`, by the method that its config names."""
    module = weight.name.removesuffix(".weight")
    method, settings = method_of(quantization), settings_of(quantization)
    codes = tensors.get(weight.name)
    if codes is not None and codes.shape == weight.shape and codes.dtype in FLOATS:
        return plain(weight)
    if method in (GPTQ, AWQ):
        make = _gptq if method == GPTQ else _awq
        return Matrix(method, make(module, weight, settings))  # type: ignore[arg-type]
    if method == BITSANDBYTES:
        eight = f"{module}.SCB" in tensors or (codes is not None and codes.shape == weight.shape)
        kind = str(settings.get("bnb_4bit_quant_type", "nf4"))
        return _int8(module, weight) if eight else _four_bit(weight, kind, tensors)
    if method == OWN_METHOD:
        return _own(module, weight, str(settings["weights"]))
    return _published(module, weight, settings, tensors)


def plain(weight: Weight) -> Matrix:
    """A tensor in a plain dtype, which is cast to the model's own."""
    return Matrix(None, (Part(weight.name, FLOATS, (weight.shape,), HALF * weight.numel),))


def _four_bit(weight: Weight, kind: str, tensors: Mapping[str, Tensor]) -> Matrix:
    """bitsandbytes: two codes a byte in any dtype of storage, and the state beside them.

    Source: bitsandbytes 0.50.2, functional.py, QuantState.as_dict.

    Args:
        kind: What config.json says of it; the state's own name wins.
    """
    name, codes = weight.name, tensors.get(weight.name)
    kind = next((one for one in QUANT_TYPES if f"{name}.quant_state.bitsandbytes__{one}" in tensors), kind)
    nested = any(f"{name}.{part}" in tensors for part in ("nested_absmax", "nested_quant_map"))
    maxima = tensors.get(f"{name}.absmax")
    nested = nested or (maxima is not None and maxima.dtype == UINT8.stored)
    sizes = [-(-weight.numel // size) for size in _BLOCKS]
    blocks = maxima.shape[0] if maxima is not None and maxima.shape else sizes[1]
    item = BY_STORED[codes.dtype].nbytes if codes is not None and codes.dtype in _STORAGE else 1
    parts = [
        Part(name, _STORAGE, ((-(-weight.numel // (2 * item)), 1),)),
        Part(f"{name}.absmax", ("U8",) if nested else ("F32", "F16", "BF16"), tuple((size,) for size in sizes)),
        Part(f"{name}.quant_map", ("F32",), ((16,),)),
        Part(f"{name}.quant_state.bitsandbytes__{kind}", ("U8",), (), _OFFSET if nested else 0),
    ]
    if nested:
        parts.append(Part(f"{name}.nested_absmax", ("F32",), ((-(-blocks // NESTED_BLOCK),),)))
        parts.append(Part(f"{name}.nested_quant_map", ("F32",), ((256,),)))
    return Matrix(four_bit_format(kind, double=nested), tuple(parts))


def _int8(module: str, weight: Weight) -> Matrix:
    """bitsandbytes: a code a weight, a float32 a row, and a note of the layout, which is not kept."""
    return Matrix(
        "int8",
        (
            Part(weight.name, ("I8",), (weight.shape,)),
            Part(f"{module}.SCB", ("F32",), (weight.shape[:1],)),
            Part(f"{module}.weight_format", ("U8",), ((), (1,)), 0, optional=True),
        ),
    )


def _gptq(module: str, weight: Weight, settings: Mapping[str, object]) -> tuple[Part, ...]:
    """GPTQ: codes down the columns in words of 32 bits; scales and zeros for each group of columns.

    Without an order of its own (`desc_act`), the group of each column is its number over the size of a group.
    """
    rows, columns = weight.shape
    bits = _size(settings, "bits", 4)
    groups = _groups(columns, settings)
    ordered = bool(settings.get("desc_act"))
    return (
        Part(f"{module}.qweight", ("I32",), ((columns * bits // _WORD, rows),)),
        Part(f"{module}.qzeros", ("I32",), ((groups, rows * bits // _WORD),)),
        Part(f"{module}.scales", FLOATS, ((groups, rows),), HALF * groups * rows),
        Part(f"{module}.g_idx", ("I32",), ((columns,),), 4 * columns, optional=not ordered),
    )


def _awq(module: str, weight: Weight, settings: Mapping[str, object]) -> tuple[Part, ...]:
    """AWQ: codes along the rows, eight in a word."""
    rows, columns = weight.shape
    groups = _groups(columns, settings)
    return (
        Part(f"{module}.qweight", ("I32",), ((columns, rows // _AWQ_CODES),)),
        Part(f"{module}.qzeros", ("I32",), ((groups, rows // _AWQ_CODES),)),
        Part(f"{module}.scales", FLOATS, ((groups, rows),), HALF * groups * rows),
    )


def _own(module: str, weight: Weight, name: str) -> Matrix:
    """This library's formats on torch's operators: the parts of the storage format, in any dtype that has its bytes."""
    rows, columns = weight.shape
    half = columns // 2 if FORMATS[name].is_tinygemm else columns
    codes = Part(weight.name, ("U8", "I8", "F8_E4M3"), ((rows, half),))
    scales = FORMATS[name].parts[1].name
    groups = FORMATS[name].group_size
    shape = (columns // groups, rows, 2) if groups else (rows,)
    return Matrix(name, (codes, Part(f"{module}.{scales}", FLOATS, (shape,))))  # type: ignore[arg-type]


def _published(module: str, weight: Weight, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Matrix:
    """fp8 by blocks and compressed-tensors, which are counted: codes, scales, and all else that is beside them."""
    size = settings.get("weight_block_size")
    if method_of(settings) == BLOCK_FP8 and isinstance(size, (list, tuple)) and len(size) == 2:
        blocks = tuple(-(-length // step) for length, step in zip(weight.shape, size, strict=True))
        scale = Part(f"{module}.weight_scale_inv", (*FLOATS, "U8", "F8_E8M0"), (blocks,))
        return Matrix("fp8-block", (Part(weight.name, ("F8_E4M3",), (weight.shape,)), scale))
    packed = f"{module}.weight_packed"
    name = packed if packed in tensors else weight.name
    scale_name = f"{module}.weight_scale_inv" if method_of(settings) == BLOCK_FP8 else f"{module}.weight_scale"
    parts = [_packed(name, weight, tensors), Part(scale_name, (*FLOATS, "F8_E4M3", "U8"))]
    known = {part.name for part in parts}
    beside = [other for other in tensors if other.startswith(f"{module}.") and other not in known]
    parts += [
        Part(other, (tensors[other].dtype,), (tensors[other].shape,))
        for other in sorted(beside)
        if not other.endswith(".bias")
    ]
    return Matrix("fp8-block" if method_of(settings) == BLOCK_FP8 else "compressed-tensors", tuple(parts))


def _packed(name: str, weight: Weight, tensors: Mapping[str, Tensor]) -> Part:
    """Codes of one to eight bits a weight, packed or one a byte."""
    held = tensors.get(name)
    dtypes = ("F8_E4M3", "I8", "U8", "I32")
    if held is None or held.dtype not in ("I32", "U8"):
        return Part(name, dtypes, (weight.shape,))
    whole = weight.numel <= 8 * held.nbytes <= 9 * weight.numel
    return Part(name, dtypes, (held.shape if whole else weight.shape,))


def _groups(columns: int, settings: Mapping[str, object]) -> int:
    """Groups of columns that share a scale; -1 is one for all."""
    size = settings.get("group_size", 128)
    return -(-columns // size) if isinstance(size, int) and size > 0 else 1


def _size(settings: Mapping[str, object], key: str, default: int) -> int:
    value = settings.get(key, default)
    return value if isinstance(value, int) else default
