"""All-pairs arrays: few rows that together hold every allowed pair of values of two factors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Value = Hashable
Cell = tuple[str, Value]  # a factor's name, and one of its values
Allowed = Callable[[Cell, Cell], bool]


def pairs(factors: Mapping[str, Sequence[Value]]) -> Iterator[tuple[Cell, Cell]]:
    """Every pair of values of two different factors, in the order of the factors."""
    for one, two in combinations(factors, 2):
        yield from (((one, first), (two, second)) for first in factors[one] for second in factors[two])


def all_pairs(factors: Mapping[str, Sequence[Value]], allowed: Allowed = lambda one, two: True) -> list[dict[str, Any]]:
    """Rows, one value of each factor, that hold every pair that `allowed` permits; no row holds another pair.

    Greedy and deterministic: each row begins with the first pair that no row holds yet. Each further factor takes the
    value that adds most such pairs, or else the one used least.

    Raises:
        ValueError: a pair is allowed, and no row can hold it.
    """
    permitted = {frozenset(pair) for pair in pairs(factors) if allowed(*pair)}
    missing = {pair: None for pair in pairs(factors) if frozenset(pair) in permitted}  # in order, unlike a set
    used = {(factor, value): 0 for factor, values in factors.items() for value in values}
    rows = []
    while missing:
        seed = next(iter(missing))
        row = _complete(dict(seed), factors, permitted, missing, used)
        if row is None:
            raise ValueError(f"{seed[0]} and {seed[1]} are allowed together, and no row can hold both")
        rows.append({factor: row[factor] for factor in factors})
        for cell in row.items():
            used[cell] += 1
        for pair in combinations(rows[-1].items(), 2):
            missing.pop(pair, None)
    return rows


def _complete(row, factors, permitted, missing, used) -> dict[str, Any] | None:
    """`row` with a value for every factor; `None` if each choice leads to a pair that is not permitted."""
    left = [factor for factor in factors if factor not in row]
    if not left:
        return row
    factor = left[0]

    def gain(value: Value) -> tuple[int, int]:
        new = sum((cell, (factor, value)) in missing or ((factor, value), cell) in missing for cell in row.items())
        return -new, used[factor, value]

    for value in sorted(factors[factor], key=gain):
        if all(frozenset((cell, (factor, value))) in permitted for cell in row.items()):
            found = _complete({**row, factor: value}, factors, permitted, missing, used)
            if found is not None:
                return found
    return None
