"""Texts of what is wrong with a quantized checkpoint, and the step that helps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_vram.arithmetic import quantizers
from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.arithmetic.quantization import BITSANDBYTES, KEYS, OWN_METHOD, dynamic_rule, method_of, settings_of
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.stored_matrix import Matrix, Part, matrix_of
from qwen_vram.files.header import Tensor

_BLOCK = KEYS[0]
# Layouts and bits that GPTQModel's plain kernels read, triton without 3 bits. Source: GPTQModel 7.6.0, tritonv2.py,
# gemm_awq_triton.py.
LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
# Key of the list that leaves modules in 16 bits, by method.
_LISTS = {
    BITSANDBYTES: "llm_int8_skip_modules",
    OWN_METHOD: "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "gptq": "dynamic",
}


def plain_weights(quantization: object, dtype: str, source: str) -> str:
    """A block over weights that nothing quantized."""
    method = quantizers.method_name(quantization)
    return (
        f"{source} says that {method} quantized the weights, and they are stored as {dtype}, not quantized; take "
        f"{_BLOCK} out of config.json, and the checkpoint loads as it is (weights='nf4' quantizes it while it loads)"
    )


def no_block(found: str, architecture: Architecture, tensors: Mapping[str, Tensor], source: str) -> str:
    """Quantized weights that config.json does not speak of: whose they are, and the block that is missing."""
    if found in ("gptq", "awq", BITSANDBYTES, OWN_METHOD):
        block = _block(found, architecture, tensors)
        name = quantizers.QUANTIZERS[str(block["quant_method"])].name
        return (
            f"the weights are quantized by {name} ({_sign(tensors, found)}), and {source} has no {_BLOCK}; add to it: "
            f'"{_BLOCK}": {json.dumps(block)}'
        )
    if found == "unknown":
        name = next(
            n for n, tensor in tensors.items() if n.endswith("proj.weight") and tensor.dtype not in quantizers.FLOATS
        )
        return (
            f"{name!r} is stored as {tensors[name].dtype}, without scales of a known quantizer, and {source} has no "
            f"{_BLOCK}; use the 16-bit checkpoint, or bring its config.json"
        )
    return f"{source} has no {_BLOCK}, and {quantizers.not_loaded({}, found, _total(tensors))}"


def not_loaded(quantization: object, found: str, nbytes: int, source: str) -> str:
    """A quantizer that this library does not load, or a block that names none."""
    method = method_of(quantization)
    loads = {"gptq": "gptq", "awq": "awq", BITSANDBYTES: BITSANDBYTES}
    if method is None and found in loads:
        return (
            f"{source}: {_BLOCK} has no quant_method, and the weights are quantized by "
            f'{quantizers.QUANTIZERS[found].name}; add "quant_method": "{loads[found]}" to it'
        )
    named = method or (found if found not in ("", "unknown") else quantizers.method_name(quantization))
    return f"{source}: {quantizers.not_loaded(quantization, named, nbytes)}"


def unreadable_settings(quantization: object, names: Iterable[str]) -> str:
    """What no kernel here reads of a block's settings; empty if there is nothing."""
    settings, method = settings_of(quantization), method_of(quantization)
    if method == BITSANDBYTES:
        flags = [bool(settings.get(key)) for key in ("load_in_4bit", "load_in_8bit")]
        if sum(flags) != 1:
            said = "both true" if all(flags) else "neither true"
            return f"load_in_4bit and load_in_8bit are {said} in {_BLOCK}; set the one that the tensors are in"
        return ""
    if method not in LAYOUTS:
        return ""
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
    """Whether a rule of `dynamic` gives a module other settings than the rest have."""
    base = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, **settings}
    for name in names:
        rule = dynamic_rule(settings, name.removesuffix(".weight"))
        if isinstance(rule, Mapping) and any(rule[key] != base[key] for key in rule if key in base):
            return True
    return False


def missing_parts(
    weight: Weight, matrix: Matrix, missing: list[Part], tensors: Mapping[str, Tensor], source: str
) -> str:
    """A matrix of which a part is not in the file."""
    names = ", ".join(repr(part.name) for part in missing[:3])
    held = next(tensors[part.name] for part in matrix.parts if part.name in tensors)
    library = FORMATS[str(matrix.format)].library
    if library == "bitsandbytes":
        cause = (
            "it was saved without its quantization state. Save the model again with save_pretrained() of transformers, "
            "or load the 16-bit checkpoint with weights='nf4'"
        )
    elif missing[0].name.endswith(".g_idx"):
        cause = (
            f"desc_act is true in {source}, so that only g_idx says the order of its columns. Copy it from the "
            "published checkpoint, or set desc_act to false if it was quantized without an order"
        )
    else:
        cause = (
            "its codes mean nothing without. Copy the file from the published checkpoint, or quantize the model again"
        )
    return f"{weight.name!r} is stored in {matrix.format} in {held.file!r}, which lacks {names}: {cause}"


def wrong_part(weight: Weight, matrix: Matrix, part: Part, held: Tensor, quantization: object, source: str) -> str:
    """A tensor of another dtype or shape than the architecture and the block say."""
    if held.nbytes == 0:
        return (
            f"{part.name!r} is empty in {held.file!r}: sharded training (ZeRO-3, FSDP) saved it without gathering the "
            "weights; save the model again with the weights gathered, or use another checkpoint"
        )
    stored = f" stored in {matrix.format}" if matrix.format else ""
    shapes = " or ".join(str(list(shape)) for shape in part.shapes[:2]) or "any shape"
    text = (
        f"{part.name!r} of {weight.name!r}, of shape {list(weight.shape)} by {source}{stored}, should be "
        f"{' or '.join(part.dtypes)} of shape {shapes}, got {list(held.shape)} as {held.dtype} in {held.file!r}"
    )
    if matrix.format is None:
        kind = (
            "codes of a quantizer"
            if held.dtype not in quantizers.FLOATS
            else "config.json and weights of different models"
        )
        return f"{text}: {kind}; use the checkpoint that config.json is of"
    keys = {"gptq": "bits and group_size", "awq": "bits and group_size"}.get(str(matrix.format), "quant_method")
    return f"{text}; check {keys} in {_BLOCK}, or config.json and weights are of different models"


def not_left_out(module: str, quantization: object, source: str) -> str:
    """A 16-bit matrix that the block takes for a quantized one."""
    method = str(method_of(quantization))
    key = _LISTS[method]
    change = f'"-:{module}": {{}} to dynamic' if key == "dynamic" else f'"{module}" to {key}'
    beside = ' (with "lm_head", which is left out by default)' if _is_default(quantization, key, module) else ""
    return (
        f"{module!r} is stored in 16 bits, and {source} does not say that {method} left it out; add {change} in "
        f"{_BLOCK}{beside}"
    )


def _is_default(quantization: object, key: str, module: str) -> bool:
    return key != "dynamic" and settings_of(quantization).get(key) is None and module != "lm_head"


def left_out_and_quantized(module: str, key: str, name: str, source: str) -> str:
    """A quantized matrix that the block takes for a 16-bit one."""
    return (
        f"{module!r} is stored in {name}, and {key} in the {_BLOCK} of {source} leaves it out of quantization; take it "
        f"out of {key}" + (", or name it there" if key == "modules_in_block_to_quantize" else "")
    )


def other_bits(weight: Weight, name: str, source: str) -> str:
    """4-bit matrices where the block says 8 bits, or the reverse."""
    is_8, says = ("load_in_8bit", "load_in_4bit") if name == "int8" else ("load_in_4bit", "load_in_8bit")
    return (
        f"{weight.name!r} is stored in {name}, and {source} says {says}; set {is_8} to true and {says} to false in its "
        f"{_BLOCK}"
    )


def _block(found: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The block that a checkpoint of a quantizer that loads here should have, by its tensors."""
    weights = [weight for weight in architecture.weights() if weight.is_linear]
    if found == "gptq":
        return _gptq_block(weights, tensors)
    if found == OWN_METHOD:
        dtype = next(tensors[weight.name].dtype for weight in weights if weight.role != "head")
        own = {"I8": "int8-wo", "F8_E4M3": "fp8"}.get(dtype, "fp8")
        if any(name.endswith(".scales_and_zeros") for name in tensors):
            own = "int4"
        return {"quant_method": OWN_METHOD, "weights": own, _LISTS[OWN_METHOD]: _left(weights, tensors)}
    formats = [matrix_of(weight, {"load_in_4bit": True}, tensors).format for weight in weights]
    name = next((one for one in formats if one is not None), "nf4")
    block: dict[str, Any] = {"quant_method": BITSANDBYTES, "load_in_8bit": True}
    if name != "int8":
        kind, double = name.removesuffix("-plain"), FORMATS[name].is_double
        block = {"quant_method": BITSANDBYTES, "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        block |= {"bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "bfloat16"}
    left = _left(weights, tensors)
    return block if left == ["lm_head"] else {**block, _LISTS[BITSANDBYTES]: left}


def _gptq_block(weights: list[Weight], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Bits and group by the shapes of the codes and scales; AWQ packs along the rows, GPTQ down the columns."""
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
        return {"quant_method": "awq", "bits": bits, "group_size": size, "version": "gemm", "zero_point": True}
    ordered = any(name.endswith(".g_idx") for name in tensors)
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": ordered, "sym": True}


def _left(weights: list[Weight], tensors: Mapping[str, Tensor]) -> list[str]:
    """Matrices in a plain dtype; the head too if it is the token table."""
    left = [
        weight.name.removesuffix(".weight")
        for weight in weights
        if weight.name in tensors
        and tensors[weight.name].dtype in quantizers.FLOATS
        and tensors[weight.name].shape == weight.shape
    ]
    return left if any(weight.role == "head" for weight in weights) else [*left, "lm_head"]


def _sign(tensors: Mapping[str, Tensor], found: str) -> str:
    """A tensor that shows the quantizer."""
    ends = {
        "gptq": (".qweight",),
        BITSANDBYTES: (".SCB", "nf4", "fp4", ".absmax"),
        OWN_METHOD: ("scale", "scales_and_zeros"),
    }
    return repr(next(name for name in tensors if name.endswith(ends[found])))


def _total(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
