"""Error texts for prequantized checkpoints, with the step that helps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors.prequantized_matrix import Matrix, Part, matrix_of
from qwen_vram.checkpoints.tensors.quantized_names import FLOATS
from qwen_vram.dtypes import FP64
from qwen_vram.spec import quantizers
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.layers import Weight
from qwen_vram.spec.quantization import (
    AWQ,
    BITSANDBYTES,
    GPTQ,
    KEYS,
    OWN_METHOD,
    dynamic_rule,
    method_of,
    settings_of,
    wrong_settings,
)

_BLOCK = KEYS[0]
# Layouts and bits that GPTQModel's plain kernels read (triton without 3 bits). Source: GPTQModel 7.6.0, tritonv2.py,
# gemm_awq_triton.py.
LAYOUTS = {GPTQ: ("gptq", "gptq_v2"), AWQ: ("gemm",)}
BITS = {GPTQ: (2, 3, 4, 8), AWQ: (4,)}
# Methods whose checkpoints load, with the key of the block that leaves modules in 16 bits.
LISTS = {
    BITSANDBYTES: "llm_int8_skip_modules",
    OWN_METHOD: "modules_to_not_convert",
    AWQ: "modules_to_not_convert",
    GPTQ: "dynamic",
}
LOADED = tuple(LISTS)
_MOST_NAMES = 12


def plain_weights(quantization: object, dtype: str, source: str) -> str:
    """Return the error for a `quantization_config` over weights that are not quantized."""
    method = quantizers.method_name(quantization)
    return (
        f"{source} says that {method} quantized the weights, and they are stored as {dtype}, not quantized; take "
        f"{_BLOCK} out of config.json, and the checkpoint loads as it is (weights='nf4' quantizes it while it loads)"
    )


def no_block(found: str, architecture: Architecture, tensors: Mapping[str, Tensor], source: str) -> str:
    """Return the error for quantized weights without `quantization_config`: their quantizer, and the missing block."""
    if found in LOADED:
        return (
            f"the weights are quantized by {_who(tensors, found)}, and {source} has no {_BLOCK}; add to it: "
            f"{_entry(found, architecture, tensors)}"
        )
    if found == "unknown":
        name, dtype = next(
            (name, tensor.dtype)
            for name, tensor in tensors.items()
            if name.endswith("proj.weight") and tensor.dtype not in FLOATS
        )
        return (
            f"{name!r} is stored as {dtype}, without scales of a known quantizer, and {source} has no {_BLOCK}; use "
            "the 16-bit checkpoint, or the config.json that the quantizer wrote"
        )
    return f"{source} has no {_BLOCK}, and {quantizers.not_loaded({}, found, _total(tensors))}"


def other_quantizer(
    quantization: object, found: str, architecture: Architecture, tensors: Mapping[str, Tensor], source: str
) -> str:
    """Return the error for a `quantization_config` that names another quantizer than the tensors show."""
    return (
        f"{source} says that {quantizers.method_name(quantization)} quantized the weights, and they are by "
        f"{_who(tensors, found)}; config.json should have {_entry(found, architecture, tensors)}"
    )


def not_loaded(quantization: object, found: str, tensors: Mapping[str, Tensor], source: str) -> str:
    """Return the error for a quantizer that this library does not load, or a block that names no quantizer."""
    method = method_of(quantization)
    if method is None and found in LOADED:
        load_in = "load_in_4bit or load_in_8bit, and " if found == BITSANDBYTES else ""
        return (
            f"{source}: {_BLOCK} has no quant_method, and the weights are quantized by {_who(tensors, found)}; add "
            f'{load_in}"quant_method": "{found}" to it'
        )
    named = method or (found if found not in ("", "unknown") else quantizers.method_name(quantization))
    return f"{source}: {quantizers.not_loaded(quantization, named, _total(tensors))}"


def _who(tensors: Mapping[str, Tensor], found: str) -> str:
    """Return the quantizer, with a tensor that shows it."""
    ends = {BITSANDBYTES: ("_nf4", "_fp4", ".absmax", ".SCB"), OWN_METHOD: (".scale", ".scales_and_zeros")}
    name = next(name for name in tensors if name.endswith(ends.get(found, (".qweight",))))
    return f"{quantizers.QUANTIZERS[found].name} ({name!r})"


def _entry(found: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> str:
    """Return the entry that config.json should have."""
    return f'"{_BLOCK}": {json.dumps(_block(found, architecture, tensors))}'


def unreadable_settings(quantization: object, names: Iterable[str]) -> str:
    """Return the error for settings that no kernel here reads; empty if all are read."""
    settings, method = settings_of(quantization), method_of(quantization)
    if method not in LAYOUTS:
        return wrong_settings(quantization)
    keys = ("checkpoint_format", "format", "version")
    layout = next((str(settings[key]) for key in keys if isinstance(settings.get(key), str)), LAYOUTS[method][0])
    bits = settings.get("bits", 4)
    found = ""
    if _has_own_settings(settings, names):
        found = "bits or groups of their own for some modules ('dynamic')"
    elif layout.lower() not in LAYOUTS[method]:
        found = f"its codes in the layout {layout!r}"
    elif bits not in BITS[method]:
        found = f"codes of {bits} bits"
    if not found:
        return ""
    return (
        f"the checkpoint has {found} by its {_BLOCK}, which is not loaded; use a checkpoint of {method.upper()} with "
        f"one setting for all, {' or '.join(map(str, BITS[method]))} bits, in the layout "
        f"{' or '.join(LAYOUTS[method])}, or the 16-bit checkpoint"
    )


def _has_own_settings(settings: Mapping[str, object], names: Iterable[str]) -> bool:
    """Tell if a rule of `dynamic` gives a module other settings than the rest of the model."""
    base = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, **settings}
    for name in names:
        rule = dynamic_rule(settings, name.removesuffix(".weight"))
        if isinstance(rule, Mapping) and any(rule[key] != base[key] for key in rule if key in base):
            return True
    return False


def missing_parts(
    weight: Weight, matrix: Matrix, missing: list[Part], tensors: Mapping[str, Tensor], source: str
) -> str:
    """Return the error for a matrix that lacks a part in the file."""
    names = ", ".join(repr(part.name) for part in missing[:3])
    held = next(tensors[part.name] for part in matrix.parts if part.name in tensors)
    if FORMATS[str(matrix.format)].is_bnb:
        cause = (
            "it was saved without its quantization state. Save the model again with save_pretrained() of transformers, "
            "or load the 16-bit checkpoint with weights='nf4'"
        )
    elif missing[0].name.endswith(".g_idx"):
        cause = (
            f"desc_act is true in {source}, so that only g_idx says the order of its columns. Copy it from the "
            "published checkpoint, or set desc_act to false if the columns were quantized in their own order"
        )
    else:
        cause = (
            "its codes mean nothing without them. Use a whole copy of the checkpoint, or quantize the 16-bit model "
            "again (qwen-vram quantize)"
        )
    return f"{weight.name!r} is stored in {matrix.format} in {held.file!r}, which lacks {names}: {cause}"


def wrong_part(weight: Weight, matrix: Matrix, part: Part, held: Tensor, source: str) -> str:
    """Return the error for a tensor of another dtype or shape than architecture and block say."""
    if held.nbytes == 0:
        return (
            f"{part.name!r} is empty in {held.file!r}: training in parts (ZeRO-3, FSDP) saved it without gathering the "
            "weights; save the model again with its weights gathered"
        )
    stored = f", stored in {matrix.format}," if matrix.format else ""
    shapes = " or ".join(str(list(shape)) for shape in part.shapes[:1]) or "any shape"
    text = (
        f"{part.name!r} of a matrix of shape {list(weight.shape)} by {source}{stored} should be "
        f"{' or '.join(part.dtypes)} of shape {shapes}, got {held.dtype} of shape {list(held.shape)} in {held.file!r}"
    )
    if held.dtype not in part.dtypes and (not part.shapes or held.shape in part.shapes):
        if matrix.format is not None and held.dtype in (*FLOATS, FP64.stored):
            return f"{text}: it was cast when the model was saved. Save it again without .half() or .to(dtype)"
        if matrix.format is None:
            return f"{text}; save it in one of these"
    if matrix.format is None and held.dtype not in (*FLOATS, FP64.stored):
        return f"{text}: it is quantized, which is not loaded for this module; use a checkpoint with it in 16 bits"
    by_groups = matrix.format is not None and FORMATS[matrix.format].is_gptqmodel
    keys = "bits and group_size in quantization_config, " if by_groups else ""
    return f"{text}; check {keys}whether config.json and weights are of one model"


def not_left_out(modules: list[str], quantization: object, source: str) -> str:
    """Return the error for 16-bit matrices that the block lists as quantized."""
    method = str(method_of(quantization))
    key = LISTS[method]
    names = modules if key == "dynamic" or settings_of(quantization).get(key) is not None else ["lm_head", *modules]
    shown = ", ".join(f'"-:{name}": {{}}' if key == "dynamic" else f'"{name}"' for name in names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (
        f"{modules[0]!r} is stored in 16 bits, and {source} does not say that {method} left it out; add to {key} in "
        f"{_BLOCK}: {shown}{more}"
    )


def left_out_and_quantized(module: str, key: str, name: str, source: str) -> str:
    """Return the error for a quantized matrix that the block leaves in 16 bits."""
    cure = {
        "modules_in_block_to_quantize": "take that list out of it, for all are quantized, or name it there",
        "dynamic": "take that rule out of dynamic",
    }.get(key, f"take it out of {key}")
    return (
        f"{module!r} is stored in {name}, and {key} in the {_BLOCK} of {source} leaves it out of quantization; {cure}"
    )


def other_bits(weight: Weight, name: str, source: str) -> str:
    """Return the error for 4-bit matrices if the block says 8 bits, or the reverse."""
    is_8, says = ("load_in_8bit", "load_in_4bit") if FORMATS[name].has_outliers else ("load_in_4bit", "load_in_8bit")
    return (
        f"{weight.name!r} is stored in {name}, and {source} says {says}; set {is_8} to true and {says} to false in its "
        f"{_BLOCK}"
    )


def _block(found: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the `quantization_config` that a checkpoint should have, from its tensors."""
    weights = [weight for weight in architecture.weights() if weight.is_linear]
    if found in (GPTQ, AWQ):
        return _gptq_block(weights, tensors)
    if found == OWN_METHOD:
        dtype = next(tensors[weight.name].dtype for weight in weights if weight.role != "head")
        own = {"I8": "int8-wo", "F8_E4M3": "fp8"}.get(dtype, "fp8")
        if any(name.endswith(".scales_and_zeros") for name in tensors):
            own = "int4"
        return {"quant_method": OWN_METHOD, "weights": own, LISTS[OWN_METHOD]: _left(weights, tensors)}
    formats = [matrix_of(weight, {"load_in_4bit": True}, tensors).format for weight in weights]
    name = next((one for one in formats if one is not None), "nf4")
    block: dict[str, Any] = {"quant_method": BITSANDBYTES, "load_in_8bit": True}
    if FORMATS[name].is_bnb_4bit:
        kind, double = FORMATS[name].quant_type, FORMATS[name].is_double
        block = {"quant_method": BITSANDBYTES, "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        block |= {"bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "bfloat16"}
    left = _left(weights, tensors)
    return block if left == ["lm_head"] else {**block, LISTS[BITSANDBYTES]: left}


def _gptq_block(weights: list[Weight], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the block of GPTQ or AWQ, with bits and group size from the shapes of codes and scales.

    AWQ packs along the rows, and GPTQ along the columns.
    """
    size, bits, awq = -1, 4, False
    for weight in weights:
        module, columns = weight.name.removesuffix(".weight"), weight.shape[1]
        codes, scales = tensors.get(f"{module}.qweight"), tensors.get(f"{module}.scales")
        if codes is None or scales is None or not codes.shape or not scales.shape or not scales.shape[0]:
            continue
        awq = codes.shape[0] == columns
        bits = 4 if awq else codes.shape[0] * 32 // columns
        size = columns // scales.shape[0] if scales.shape[0] > 1 else size
    if awq:
        return {"quant_method": AWQ, "bits": bits, "group_size": size, "version": "gemm", "zero_point": True}
    ordered = any(name.endswith(".g_idx") for name in tensors)
    return {"quant_method": GPTQ, "bits": bits, "group_size": size, "desc_act": ordered, "sym": True}


def _left(weights: list[Weight], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the matrices in a plain dtype, with the head if it is tied to the embeddings."""
    left = [
        weight.name.removesuffix(".weight")
        for weight in weights
        if weight.name in tensors
        and tensors[weight.name].dtype in FLOATS
        and tensors[weight.name].shape == weight.shape
    ]
    return left if any(weight.role == "head" for weight in weights) else [*left, "lm_head"]


def _total(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
