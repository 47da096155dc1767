"""A rule: one combination of knobs, models or devices that is refused."""

# ruff: noqa: D102  (a protocol's members say nothing beside their names)

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from typing import Protocol

    from qwen_vram.spec.formats import FormatName
    from qwen_vram.spec.kv_formats import KvFormat

Scope = Literal["profile", "anywhere", "several GPUs", "this machine"]
Facts = TypeVar("Facts", contravariant=True)


if TYPE_CHECKING:

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
        def kernels(self) -> str: ...
        @property
        def captured(self) -> bool: ...
        @property
        def compiled(self) -> bool: ...


class Rule(Generic[Facts]):
    """One combination that is refused.

    Args:
        when: Tells if the facts break the rule.
        knob: The knob that the error names.
        message: The error's text; in the scope "anywhere" the part after the knob, its value and the weights.
        scope: The rule's scope: every profile, a model on any machine, several GPUs, or this machine.
        package: The package that is missing on this machine, if that is the error.
        install: The command that installs the package.
    """

    def __init__(
        self,
        when: Callable[[Facts], bool],
        knob: str,
        message: Callable[[Facts], str],
        scope: Scope,
        package: str = "",
        install: str = "",
    ) -> None:
        self.when, self.knob, self.message = when, knob, message
        self.scope: Scope = scope
        self.package, self.install = package, install


def broken(rules: Iterable[Rule[Facts]], facts: Facts) -> Rule[Facts] | None:
    """The first rule that `facts` break; `None` if they break no rule."""
    return next((rule for rule in rules if rule.when(facts)), None)
