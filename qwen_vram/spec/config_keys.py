"""Keys of config.json: their defaults and accepted values in `transformers`.

`transformers` refuses a config.json by these types when it loads. An estimate refuses it by the same, without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

Check = Callable[[object], bool]


class Key(NamedTuple):
    """One key: whether a value is accepted, what is accepted in words, and the value of a file that lacks the key."""

    accepts: Check
    words: str
    default: object


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, float)


def _number(value: object) -> bool:
    return _integer(value) or _real(value)


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _object(value: object) -> bool:
    return isinstance(value, Mapping)


def _list_of(one: Check) -> Check:
    return lambda value: isinstance(value, (list, tuple)) and all(one(item) for item in value)


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


# Largest dimension believed. Llama-3 405B's intermediate_size is 53,248 and the largest published vocabulary about
# 262,144; a config.json past this bound is damaged or hostile.
LARGEST = 10_000_000
_SIZE = f"a positive integer of at most {LARGEST}"

# Source: transformers 5.23, Qwen2Config and Qwen3Config; a test holds the two against this table.
_SHARED = {
    "vocab_size": Key(_integer, _SIZE, 151_936),
    "hidden_size": Key(_integer, _SIZE, 4_096),
    "intermediate_size": Key(_integer, _SIZE, 22_016),
    "num_hidden_layers": Key(_integer, _SIZE, 32),
    "num_attention_heads": Key(_integer, _SIZE, 32),
    "num_key_value_heads": Key(_or_null(_integer), f"{_SIZE}, or null", 32),
    "hidden_act": Key(_text, "a text", "silu"),
    "max_position_embeddings": Key(_integer, _SIZE, 32_768),
    "initializer_range": Key(_real, "a number with a decimal point, such as 0.02", 0.02),
    "rms_norm_eps": Key(_real, "a number with a decimal point or an exponent, such as 1e-06", 1e-6),
    "use_cache": Key(_flag, "true or false", True),
    "tie_word_embeddings": Key(_flag, "true or false", False),
    "rope_parameters": Key(_or_null(_object), "an object or null", None),
    "use_sliding_window": Key(_flag, "true or false", False),
    "sliding_window": Key(_or_null(_integer), "an integer or null", 4_096),
    "max_window_layers": Key(_integer, "an integer", 28),
    "layer_types": Key(_or_null(_list_of(_text)), "a list of texts or null", None),
    "attention_dropout": Key(_number, "a number", 0.0),
    "pad_token_id": Key(_or_null(_integer), "an integer or null", None),
    "bos_token_id": Key(_or_null(_integer), "an integer or null", None),
    "eos_token_id": Key(
        _or_null(_either(_integer, _list_of(_integer))), "an integer, a list of integers or null", None
    ),
}
KEYS: dict[str, dict[str, Key]] = {
    "qwen2": _SHARED,
    "qwen3": {
        **_SHARED,
        "head_dim": Key(_integer, _SIZE, 128),
        "attention_bias": Key(_flag, "true or false", False),
    },
}
# The names of torch's dtypes that a checkpoint can name, with the storage format of those that are plain here.
# transformers looks the text up in the module torch, so that "torch.bfloat16" is none.
DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
    "float64": "bf16", "double": "bf16", "float8_e4m3fn": "bf16", "float8_e5m2": "bf16", "int8": "bf16",
    "uint8": "bf16",
}  # fmt: skip


def wrong_key(model_type: str, config: Mapping[str, object]) -> str:
    """The first key whose value `transformers` refuses, with the value and what is accepted; empty if there is none."""
    for name, key in KEYS[model_type].items():
        if name in config and config[name] is None and not key.accepts(None):
            return (
                f"{name} is missing: it is null, and must be {key.words}, or be left out, which means {key.default!r}"
            )
        if name in config and not key.accepts(config[name]):
            return f"{name} must be {key.words}, got {config[name]!r}"
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if (isinstance(value, str) and value not in DTYPES) or isinstance(value, list):
            return f"{name} must be the name of a dtype such as \"bfloat16\" (without 'torch.'), got {value!r}"
    return _wrong_layer_types(model_type, config) or _wrong_labels(config)


def _wrong_layer_types(model_type: str, config: Mapping[str, object]) -> str:
    kinds, layers = config.get("layer_types"), value_of(model_type, config, "num_hidden_layers")
    if isinstance(kinds, list) and len(kinds) != layers:
        return (
            f"layer_types has {len(kinds)} entries and num_hidden_layers is {layers}, and transformers asks for one "
            "for each layer: shorten or lengthen the list, or take it out, and every layer has full attention"
        )
    return ""


def _wrong_labels(config: Mapping[str, object]) -> str:
    labels, problem = config.get("num_labels", 2), config.get("problem_type")
    if not isinstance(labels, int):
        return f"num_labels must be an integer, got {labels!r}"
    if problem == "single_label_classification" and labels == 1:
        return "problem_type 'single_label_classification' needs num_labels of at least 2, got 1"
    return ""


def value_of(model_type: str, config: Mapping[str, object], name: str) -> object:
    """The value of a key, or the default of `transformers` if config.json lacks it."""
    return config.get(name, KEYS[model_type][name].default)
