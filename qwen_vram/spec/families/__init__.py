"""Families of decoders: one module for each `model_type` of config.json.

A module is imported when a model of its family is used. It holds one `FAMILY`, a `spec.family.Family`. A new family is
a new file here, and no code lists it; `python -m tests.hygiene.layout` writes it into the list below.

Modules:
    llama  Llama and models of its architecture: dense decoders, mostly without biases.
    qwen2  Qwen2 and Qwen2.5: dense decoders with biases on queries, keys and values.
    qwen3  Qwen3: dense decoders with norms on queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module

from qwen_vram.errors import ConfigError
from qwen_vram.spec.config.keys import wrong_key
from qwen_vram.spec.config.reader import ConfigReader
from qwen_vram.spec.family import Family


@cache
def model_types() -> tuple[str, ...]:
    """The `model_type` of every family, sorted."""
    from pkgutil import iter_modules  # slow to import, and only needed for an error

    return tuple(sorted(module.name for module in iter_modules(__path__)))


@cache
def find_family(model_type: str) -> Family | None:
    """The family of a `model_type`; `None` if it is not supported."""
    if not model_type.isidentifier():
        return None
    name = f"{__name__}.{model_type}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    family: Family = module.FAMILY
    return family


def family_of(model_type: str) -> Family:
    """The family of an architecture's `model_type`.

    Raises:
        KeyError: the `model_type` is not supported.
    """
    family = find_family(model_type)
    if family is None:
        raise KeyError(model_type)
    return family


def open_config(config: Mapping[str, object], source: str) -> tuple[Family, ConfigReader]:
    """Find the family of a config.json, and make a reader of its values, checked as `transformers` checks them.

    Raises:
        ConfigError: another architecture, a model that is not a language model, a feature that would be counted wrong,
            or a value that `transformers` refuses.
    """
    got = config.get("model_type")
    family = find_family(got) if isinstance(got, str) else None
    if family is None:
        raise ConfigError(f"{source}: model_type {got!r} is not supported; {_supported()}", source=source)
    reader = ConfigReader(config, source, family.keys)
    wrong = family.refusal(config) or wrong_key(family.keys, config) or family.wrong(config)
    if wrong:
        raise ConfigError(f"{source}: {wrong}", source=source)
    return family, reader


def _supported() -> str:
    *most, last = model_types()
    names = sorted(name for model_type in model_types() for name in family_of(model_type).names)
    return f"dense {', '.join(most)} and {last} are ({', '.join(names)})"
