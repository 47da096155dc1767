"""Lengths of prompts and answers: a number, a range, or samples of a real log."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from qwen_vram.errors import WorkloadError

Lengths = int | tuple[int, int] | Sequence[int]


class Distribution(NamedTuple):
    """A distribution of lengths, from which requests are sampled.

    Attributes:
        samples: Lengths that are equally likely; empty for a range.
        least, most: The shortest and the longest length.
    """

    samples: tuple[int, ...]
    least: int
    most: int

    @property
    def mean(self) -> float:
        """The mean length."""
        return sum(self.samples) / len(self.samples) if self.samples else (self.least + self.most) / 2

    def draw(self, random: Random) -> int:
        """Sample one length."""
        return random.choice(self.samples) if self.samples else random.randint(self.least, self.most)

    def to_dict(self) -> dict[str, object]:
        """The range and the mean as plain data, with the number of samples (0 for a range)."""
        return {"least": self.least, "mean": self.mean, "most": self.most, "samples": len(self.samples)}

    def __str__(self) -> str:
        """The range in words, such as `100 to 2,000`."""
        return f"{self.least:,}" if self.least == self.most else f"{self.least:,} to {self.most:,}"


def distribution(lengths: Lengths, name: str) -> Distribution:
    """Return the distribution of `lengths`.

    Args:
        lengths: A number of tokens; a tuple of two, of which all lengths between are equally likely; or a list of
            samples.
        name: The argument's name, for the error.

    Raises:
        WorkloadError: a length that is not a positive whole number, an empty list, or a range that ends before it
            begins.

    Example:
        >>> distribution((100, 200), "prompt_len").mean
        150.0
        >>> distribution([10, 20, 60], "prompt_len").mean
        30.0
    """
    single = not isinstance(lengths, (tuple, list))
    values: tuple[object, ...] = (lengths,) if single else tuple(lengths)  # type: ignore[arg-type]
    if not values or not all(type(value) is int and value >= 1 for value in values):
        raise WorkloadError(
            f"{name} must be a positive whole number, a tuple of two (a range), or a list of samples; got {lengths!r}",
            name=name,
            got=lengths,
        )
    numbers = tuple(value for value in values if isinstance(value, int))
    if not isinstance(lengths, tuple):
        return Distribution(numbers if len(set(numbers)) > 1 else (), min(numbers), max(numbers))
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise WorkloadError(
            f"{name} as a tuple is a range, (shortest, longest); got {lengths!r}; pass samples as a list",
            name=name,
            got=lengths,
        )
    return Distribution((), *numbers)
