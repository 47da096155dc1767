"""Fields of a request, each checked by its type and range; `null` is as if it were absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from qwen_vram.serving.wire.problem import shown, wrong

Kind = TypeVar("Kind")


class Fields:
    """Reader of the fields of one JSON object.

    Args:
        values: The object.
        inside: The path of the object in the request, with a dot at its end.
    """

    def __init__(self, values: Mapping[str, Any], inside: str = "") -> None:
        self._values = values
        self._inside = inside

    def any(self, name: str) -> Any:
        """Return a field as it is; `None` if it is absent."""
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """Return a text."""
        return self._typed(name, str, "a text")

    def flag(self, name: str) -> bool | None:
        """Return true or false."""
        return self._typed(name, bool, "true or false")

    def object(self, name: str) -> dict[str, Any] | None:
        """Return an object."""
        return self._typed(name, dict, "an object")

    def list(self, name: str) -> list[Any] | None:
        """Return a list."""
        return self._typed(name, list, "a list")

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number from `low` to `high`."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(
                f"{self._inside}{name} must be a whole number from {low:,} to {high:,}, got {shown(value)}",
                self._inside + name,
            )
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number from `low` to `high`."""
        value = self.any(name)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value if isinstance(value, float) else 0)
            or not low <= value <= high
        ):
            raise wrong(
                f"{self._inside}{name} must be a number from {low} to {high}, got {shown(value)}", self._inside + name
            )
        return float(value)

    def _typed(self, name: str, kind: type[Kind], words: str) -> Kind | None:
        value = self.any(name)
        if value is not None and not isinstance(value, kind):
            raise wrong(f"{self._inside}{name} must be {words}, got {shown(value)}", self._inside + name)
        return value
