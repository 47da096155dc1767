"""Confidence intervals: of shares, and of figures over documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

# The two-sided 95 % quantile of the normal distribution.
_Z = 1.959964


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Figure) -> bool:
        """Tell if the two intervals have a value in common."""
        return self.low <= other.high and other.low <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`."""
        return asdict(self)


def share(right: int, asked: int) -> Figure:
    """Return the share of right answers with Wilson's interval.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    found = right / asked
    middle = (found + _Z**2 / (2 * asked)) / (1 + _Z**2 / asked)
    half = _Z * sqrt(found * (1 - found) / asked + _Z**2 / (4 * asked**2)) / (1 + _Z**2 / asked)
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == asked else middle + half
    return Figure(found, low, high)
