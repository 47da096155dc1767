"""Tensors of a quantized matrix in the format of each library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors.quantized_names import FLOATS
from qwen_vram.dtypes import BY_STORED, INT8, PLAIN, UINT8
from qwen_vram.spec.formats import FORMATS, NESTED_BLOCK, QUANT_TYPES, FormatName
from qwen_vram.spec.layers import Weight
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

# Bytes of an element in the model's own dtype, which has 16 bits beside quantized matrices.
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
    """One expected tensor of a stored matrix.

    Attributes:
        name: Its name in the checkpoint.
        dtypes: Allowed dtypes, as safetensors spells them.
        shapes: Allowed shapes; empty allows every shape with elements.
        kept: Bytes that the loaded model keeps of it; `None` is its size in the file.
        optional: It may be missing. Then it is not loaded, or it is created with `kept` bytes.
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
        """Return the tensor that the loaded model keeps of it; `None` if it keeps nothing."""
        held = tensors.get(self.name)
        kept = self.kept if self.kept is not None or held is None else held.nbytes
        return StoredTensor(self.name, kept) if kept else None


class Matrix(NamedTuple):
    """Storage of a matrix: `format`, which is `None` for a plain dtype, and `parts`, its tensors."""

    format: FormatName | None
    parts: tuple[Part, ...]


def matrix_of(weight: Weight, quantization: object, tensors: Mapping[str, Tensor]) -> Matrix:
    """Return the storage of `weight` by the method that the config names."""
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
    """Return a tensor in a plain dtype, which is cast to the model's own."""
    return Matrix(None, (Part(weight.name, FLOATS, (weight.shape,), HALF * weight.numel),))


def _four_bit(weight: Weight, kind: str, tensors: Mapping[str, Tensor]) -> Matrix:
    """Return bitsandbytes' storage in 4 bits: two codes per byte in any dtype, and the quantization state.

    Source: bitsandbytes 0.50.2, functional.py, QuantState.as_dict.

    Args:
        kind: The data type in config.json; the name in the state is preferred.
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
    """Return bitsandbytes' storage in 8 bits: a code per weight, a float32 per row, and a layout number (not kept)."""
    return Matrix(
        "int8",
        (
            Part(weight.name, ("I8",), (weight.shape,)),
            Part(f"{module}.SCB", ("F32",), (weight.shape[:1],)),
            Part(f"{module}.weight_format", ("U8",), ((), (1,)), 0, optional=True),
        ),
    )


def _gptq(module: str, weight: Weight, settings: Mapping[str, object]) -> tuple[Part, ...]:
    """Return the parts of GPTQ: codes in words of 32 bits along the columns, scales and zeros per group of columns.

    Without `desc_act`, the group of a column is its number divided by the group size.
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
    """Return the parts of AWQ: codes along the rows, eight in a word."""
    rows, columns = weight.shape
    groups = _groups(columns, settings)
    return (
        Part(f"{module}.qweight", ("I32",), ((columns, rows // _AWQ_CODES),)),
        Part(f"{module}.qzeros", ("I32",), ((groups, rows // _AWQ_CODES),)),
        Part(f"{module}.scales", FLOATS, ((groups, rows),), HALF * groups * rows),
    )


def _own(module: str, weight: Weight, name: str) -> Matrix:
    """Return this library's formats on torch's operators: codes and scales, in every dtype of the same size."""
    rows, columns = weight.shape
    half = columns // 2 if FORMATS[name].is_tinygemm else columns
    codes = Part(weight.name, ("U8", "I8", "F8_E4M3"), ((rows, half),))
    scales = FORMATS[name].parts[1].name
    groups = FORMATS[name].group_size
    shape = (columns // groups, rows, 2) if groups else (rows,)
    return Matrix(name, (codes, Part(f"{module}.{scales}", FLOATS, (shape,))))  # type: ignore[arg-type]


def _published(module: str, weight: Weight, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Matrix:
    """Return the storage of fp8 by blocks or compressed-tensors, which are counted and not loaded."""
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
    """Return the part of codes with one to eight bits per weight, packed or one per byte."""
    held = tensors.get(name)
    dtypes = ("F8_E4M3", "I8", "U8", "I32")
    if held is None or held.dtype not in ("I32", "U8"):
        return Part(name, dtypes, (weight.shape,))
    whole = weight.numel <= 8 * held.nbytes <= 9 * weight.numel
    return Part(name, dtypes, (held.shape if whole else weight.shape,))


def _groups(columns: int, settings: Mapping[str, object]) -> int:
    """Return the number of groups of columns that share a scale; a group size of -1 is one group."""
    size = settings.get("group_size", 128)
    return -(-columns // size) if isinstance(size, int) and size > 0 else 1


def _size(settings: Mapping[str, object], key: str, default: int) -> int:
    value = settings.get(key, default)
    return value if isinstance(value, int) else default
