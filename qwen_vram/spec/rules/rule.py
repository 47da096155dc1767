"""A rule: one combination of knobs, models or devices that is refused."""

# ruff: noqa: D102  (a protocol's members say nothing beside their names)

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from qwen_vram.spec.formats import FormatName
from qwen_vram.spec.kv_formats import KvFormat

Scope = Literal["profile", "anywhere", "several GPUs", "this machine"]
Facts = TypeVar("Facts", contravariant=True)


class Knobs(Protocol):
    """The knobs of a profile that rules read."""

    @property
    def weights(self) -> FormatName: ...
    @property
    def head_format(self) -> FormatName: ...
    @property
    def dtype(self) -> FormatName: ...
    @property
    def kv_format(self) -> KvFormat: ...
    @property
    def kv_device(self) -> str: ...
    @property
    def cache(self) -> str: ...
    @property
    def streamed_layers(self) -> int: ...
    @property
    def host_layers(self) -> int: ...
    @property
    def disk_layers(self) -> int: ...
    @property
    def compiled(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Rule(Generic[Facts]):
    """One combination that cannot be.

    Attributes:
        when: Tells if the facts break the rule.
        knob: The knob that the error names.
        message: The error's text; of scope "anywhere" what follows the knob, its value and the weights.
        scope: Where it holds: in every profile, for a model on any machine, over several GPUs, or on this machine.
        package: What is missing here, if the error is that; and the command that installs it.
    """

    when: Callable[[Facts], bool]
    knob: str
    message: Callable[[Facts], str]
    scope: Scope
    package: str = ""
    install: str = ""


def broken(rules: Iterable[Rule[Facts]], facts: Facts) -> Rule[Facts] | None:
    """The first rule that `facts` break; `None` if they break none."""
    return next((rule for rule in rules if rule.when(facts)), None)
