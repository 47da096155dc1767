"""Configurations: the article's three, plain `transformers`, profiles and plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from qwen_vram.errors import UnknownNameError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import PROFILES
from qwen_vram.units import format_bytes, parse_bytes

By = Literal["transformers", "qwen_vram"]


class Configuration(NamedTuple):
    """One configuration.

    Attributes:
        name: Its name in options and results.
        about: The configuration in words.
        by: The library that loads the model.
        arguments: Arguments of `load`; for plain `transformers` only `weights`, the storage format.
    """

    name: str
    about: str
    by: By
    arguments: dict[str, Any]

    @property
    def needs_gpu(self) -> bool:
        """Tell if the configuration captures decode steps, which no CPU does."""
        name = self.arguments.get("profile")
        return name is not None and PROFILES[name].captures


class Claim(NamedTuple):
    """A row of the article's table: bytes of 512 + 512 tokens at batch size 1, and milliseconds a token."""

    text: str
    weights: int
    kv_cache: int
    process_total: int
    ms_per_token: int


# Source: the article's table of measurements (docs/article.md), in GB of 10^9 bytes.
CLAIMS = {
    "default": Claim("FP16, default", 15_200_000_000, 4_800_000_000, 19_500_000_000, 82),
    "int4-flash": Claim("INT4 + Flash Attention", 6_100_000_000, 3_200_000_000, 10_300_000_000, 95),
    "cpu-offload": Claim("CPU offload, 3 layers", 8_700_000_000, 3_000_000_000, 11_700_000_000, 142),
}
CLAIMED_WORKLOAD = {"prompt_len": 512, "max_new_tokens": 512, "batch_size": 1}

_PROFILES = {
    "default": "the article's first row: 16-bit weights, plain settings",
    "int4-flash": "its second row: NF4 weights, flash attention",
    "cpu-offload": "its third row: three layers in host memory",
    "compact": "the smallest profile with all layers on the GPU",
    "speed": "int4 weights, compiled decode steps",
}
_PLAIN = {"transformers": "bf16", "transformers-nf4": "nf4"}


def configurations(architecture: Architecture, vram: Sequence[str | int] = ()) -> list[Configuration]:
    """Return every configuration for a model.

    Args:
        vram: Budgets of further plans.

    Raises:
        UnitError: a budget is not a size.
    """
    half = architecture.num_hidden_layers // 2
    plain = [
        Configuration(name, f"plain transformers, {weights} weights", "transformers", {"weights": weights})
        for name, weights in _PLAIN.items()
    ]
    profiles = [
        Configuration(name, about, "qwen_vram", {"profile": PROFILES[name].name}) for name, about in _PROFILES.items()
    ]
    streamed = Configuration(
        "streamed",
        f"NF4 weights, {half} of {architecture.num_hidden_layers} layers streamed from host memory",
        "qwen_vram",
        {"profile": "int4-flash", "streamed_layers": half},
    )
    plans = [Configuration("plan", "the plan for the free memory", "qwen_vram", {})]
    for size in vram:
        shown = format_bytes(parse_bytes(size, name="vram"))
        name = f"plan-{shown.replace(' ', '')}"
        plans.append(Configuration(name, f"the plan for {shown}", "qwen_vram", {"vram": size}))
    return [*plain, *profiles, streamed, *plans]


def chosen(every: Sequence[Configuration], names: Sequence[str] | None, *, on_cpu: bool) -> list[Configuration]:
    """Return the configurations with these names, in their own order; `None` is all that the device can run.

    Raises:
        UnknownNameError: there is no configuration of a name.
    """
    if names is None:
        return [one for one in every if not (on_cpu and one.needs_gpu)]
    known = tuple(one.name for one in every)
    for name in names:
        if name not in known:
            raise UnknownNameError("row of the benchmark", name, known)
    return [one for one in every if one.name in names]
