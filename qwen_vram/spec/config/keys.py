"""Keys of config.json: their defaults and accepted values in `transformers`.

`transformers` refuses a config.json by these types when it loads. An estimate refuses it by the same, without torch.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from qwen_vram.dtypes import BY_CONFIG

Check = Callable[[object], bool]


class Key(NamedTuple):
    """One key: a check of its value, the accepted values in words, and the value if the file lacks the key."""

    accepts: Check
    words: str
    default: object


Keys = Mapping[str, Key]


def integer(value: object) -> bool:
    """Tell if a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def real(value: object) -> bool:
    """Tell if a value is a number with a decimal point or an exponent."""
    return isinstance(value, float)


def number(value: object) -> bool:
    """Tell if a value is a number."""
    return integer(value) or real(value)


def flag(value: object) -> bool:
    """Tell if a value is true or false."""
    return isinstance(value, bool)


def text(value: object) -> bool:
    """Tell if a value is a text."""
    return isinstance(value, str)


def mapping(value: object) -> bool:
    """Tell if a value is an object."""
    return isinstance(value, Mapping)


def list_of(one: Check) -> Check:
    """A check for lists whose entries pass `one`."""
    return lambda value: isinstance(value, (list, tuple)) and all(one(item) for item in value)


def either(*checks: Check) -> Check:
    """A check for values that pass one of `checks`."""
    return lambda value: any(check(value) for check in checks)


def or_null(check: Check) -> Check:
    """A check for null, and for values that pass `check`."""
    return lambda value: value is None or check(value)


# Largest dimension believed. Llama-3 405B's intermediate_size is 53,248 and the largest published vocabulary about
# 262,144; a config.json past this bound is damaged or hostile.
LARGEST = 10_000_000
SIZE = f"a positive integer of at most {LARGEST}"


def wrong_key(keys: Keys, config: Mapping[str, object]) -> str:
    """The first key whose value `transformers` refuses, with the value and the accepted ones; otherwise empty."""
    for name, key in keys.items():
        if name in config and config[name] is None and not key.accepts(None):
            return (
                f"{name} is missing: it is null, and must be {key.words}, or be left out, which means {key.default!r}"
            )
        if name in config and not key.accepts(config[name]):
            return f"{name} must be {key.words}, got {config[name]!r}"
    for name in ("dtype", "torch_dtype"):  # transformers looks it up in the module torch: "torch.bfloat16" is not in it
        value = config.get(name)
        if (isinstance(value, str) and value not in BY_CONFIG) or isinstance(value, list):
            return f"{name} must be the name of a dtype such as \"bfloat16\" (without 'torch.'), got {value!r}"
    return _wrong_layer_types(keys, config) or _wrong_labels(config)


def _wrong_layer_types(keys: Keys, config: Mapping[str, object]) -> str:
    kinds, layers = config.get("layer_types"), value_of(keys, config, "num_hidden_layers")
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


def value_of(keys: Keys, config: Mapping[str, object], name: str) -> object:
    """The value of a key, or the default of `transformers` if config.json lacks it; `None` for a key without one."""
    return config.get(name, keys[name].default if name in keys else None)
