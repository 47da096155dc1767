"""`quantization_config` of config.json: method, format, and modules left out.

It uses no tensors; `checkpoints.tensors.prequantized` compares them with these settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

from qwen_vram.spec.formats import FORMATS, FormatName

# Keys of the block: first that of transformers; the other two are of compressed-tensors and mlx-lm.
KEYS = ("quantization_config", "compression_config", "quantization")

# quant_method of config.json -> storage format. Bits, groups and skipped modules vary, so only headers give the bytes.
GPTQ, AWQ, BLOCK_FP8 = "gptq", "awq", "fp8"
METHODS: dict[str, FormatName] = {
    GPTQ: "gptq",
    AWQ: "awq",
    BLOCK_FP8: "fp8-block",
    "compressed-tensors": "compressed-tensors",
}
# The quant_method that this library writes, for formats on torch's own operators.
OWN_METHOD = "qwen_vram"
BITSANDBYTES = "bitsandbytes"
# bitsandbytes' defaults. Source: transformers 5.23, BitsAndBytesConfig.
_QUANT_TYPE = "fp4"
_FOUR_BIT: dict[tuple[object, bool], FormatName] = {
    (row.quant_type, row.is_double): cast("FormatName", name) for name, row in FORMATS.items() if row.is_bnb_4bit
}


def quantization_of(config: Mapping[str, object]) -> object:
    """The quantization block of config.json, under any of its keys; `None` for plain dtypes."""
    return next((config[key] for key in KEYS if config.get(key) is not None), None)


def without_quantization(config: Mapping[str, object]) -> dict[str, object]:
    """`config` as if its weights were stored in a plain dtype."""
    return {key: value for key, value in config.items() if key not in KEYS}


def settings_of(quantization: object) -> Mapping[str, object]:
    """The block as a mapping; empty if it has another type."""
    return quantization if isinstance(quantization, Mapping) else {}


def method_of(quantization: object) -> str | None:
    """`quant_method`; bitsandbytes if the block says "load in 4 or 8 bits", as `transformers` reads it."""
    settings = settings_of(quantization)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return BITSANDBYTES
    method = settings.get("quant_method")
    return method if isinstance(method, str) else None


def stored_format(quantization: object) -> tuple[FormatName | None, bool]:
    """Return the storage format that a block names, and True if only the headers give its bytes.

    The format is `None` if the library does not count it. A checkpoint of bitsandbytes or of this library is counted
    from its config alone, unless modules other than the head are left in 16 bits.
    """
    settings, method = settings_of(quantization), method_of(quantization)
    if method == OWN_METHOD:
        own = settings.get("weights")
        known = isinstance(own, str) and own in FORMATS and FORMATS[own].is_weight_only
        return (cast("FormatName", own) if known else None), leaves_out_more(settings)
    if method != BITSANDBYTES:
        return METHODS.get(str(method)), True
    name: FormatName | None = None
    four, eight = bool(settings.get("load_in_4bit")), bool(settings.get("load_in_8bit"))
    if four and not eight:
        double = bool(settings.get("bnb_4bit_use_double_quant"))
        name = _FOUR_BIT.get((settings.get("bnb_4bit_quant_type", _QUANT_TYPE), double))
    elif eight and not four:
        name = "int8"
    return name, leaves_out_more(settings)


def wrong_settings(quantization: object) -> str:
    """The error in a block of bitsandbytes or of this library by itself; empty if it is correct."""
    settings, method = settings_of(quantization), method_of(quantization)
    if method == OWN_METHOD and stored_format(quantization)[0] is None:
        own = ", ".join(name for name, storage in FORMATS.items() if storage.is_weight_only)
        return f"weights is {settings.get('weights')!r} in {KEYS[0]}; set the one that the tensors are in: {own}"
    if method == BITSANDBYTES:
        flags = [bool(settings.get(key)) for key in ("load_in_4bit", "load_in_8bit")]
        if sum(flags) != 1:
            said = "both true" if all(flags) else "neither true"
            return f"load_in_4bit and load_in_8bit are {said} in {KEYS[0]}; set the one that the tensors are in"
    return ""


def four_bit_format(quant_type: str, *, double: bool) -> FormatName:
    """Bitsandbytes' storage format of 4-bit matrices."""
    return _FOUR_BIT[quant_type, double]


def leaves_out_more(settings: Mapping[str, object]) -> bool:
    """Tell if the block leaves modules other than the head in 16 bits."""
    return bool(set(skipped_modules(settings)) - {"lm_head"})


def skipped_modules(settings: Mapping[str, object]) -> list[str]:
    """The modules that bitsandbytes or this library did not quantize; only the head if the block names none."""
    skipped = settings.get("llm_int8_skip_modules", settings.get("modules_to_not_convert"))
    return [str(name) for name in cast("list[object]", skipped)] if isinstance(skipped, list) else ["lm_head"]


def skips(patterns: Iterable[str], module: str) -> bool:
    """Tell if a list of `transformers` leaves `module` out: as a prefix, a regular expression, or a suffix.

    Source: transformers 5.23, quantizers_utils.py, should_convert_module.
    """
    for pattern in patterns:
        if module.endswith(pattern):
            return True
        try:
            if re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module):
                return True
        except re.error:  # not a regular expression; transformers would not start either
            continue
    return False


def leaving_out(quantization: object, module: str) -> str:
    """The key of the block that leaves `module`, by its full name, in 16 bits; empty if it is quantized.

    Source: transformers 5.23 and optimum 2.3 (GPTQQuantizer.convert_model), GPTQModel 7.6.0 (dynamic).
    """
    settings, method = settings_of(quantization), method_of(quantization)
    if method == BITSANDBYTES:
        return "llm_int8_skip_modules" if skips(skipped_modules(settings), module) else ""
    if method == OWN_METHOD:
        return "modules_to_not_convert" if module in skipped_modules(settings) else ""
    for key in ("modules_to_not_convert", "modules_not_to_convert"):
        if skips(_names(settings.get(key)), module):
            return key
    if module == "lm_head":
        return "lm_head"
    if method == GPTQ:
        named = _names(settings.get("modules_in_block_to_quantize"))
        if named and not module.endswith(tuple(named)):
            return "modules_in_block_to_quantize"
        if dynamic_rule(settings, module) is False:
            return "dynamic"
    return ""


def dynamic_rule(settings: Mapping[str, object], module: str) -> Mapping[str, object] | bool | None:
    """The first rule of GPTQModel's `dynamic` for `module`: `False` leaves it out, a mapping has its settings."""
    rules = settings.get("dynamic")
    for pattern, own in rules.items() if isinstance(rules, Mapping) else ():
        try:
            named = re.match(str(pattern).removeprefix("-:").removeprefix("+:"), module)
        except re.error:
            continue
        if named:
            return False if str(pattern).startswith("-:") else settings_of(own)
    return None


def _names(value: object) -> list[str]:
    """The names of a list, or of lists in a list, as one list."""
    if isinstance(value, str):
        return [value]
    return [name for item in value for name in _names(item)] if isinstance(value, (list, tuple)) else []
