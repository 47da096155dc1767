"""Products of parameters, thinned for `make test`; the marker `full` has the rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from tests.helpers.pairs import all_pairs


def thinned(strength: int, **factors: Sequence[Any]) -> tuple[str, list[Any]]:
    """The product of `factors` as arguments of `pytest.mark.parametrize`.

    `make test` runs rows that together hold every value (strength 1) or every pair of values (strength 2).
    """
    indices = {name: range(len(values)) for name, values in factors.items()}
    if strength == 2:
        kept = {tuple(row[name] for name in factors) for row in all_pairs(indices)}
    else:
        longest = max(map(len, indices.values()))
        kept = {tuple(number % len(one) for one in indices.values()) for number in range(longest)}
    rows = []
    for row in product(*indices.values()):
        chosen = [values[at] for values, at in zip(factors.values(), row, strict=True)]
        marks = [mark for one in chosen if isinstance(one, ParameterSet) for mark in one.marks]
        bare = [one.values[0] if isinstance(one, ParameterSet) else one for one in chosen]
        rows.append(pytest.param(*bare, marks=marks if row in kept else [*marks, pytest.mark.full]))
    return ",".join(factors), rows


def repeated(count: int, *, of: int) -> list[Any]:
    """Numbers from 0 on for a repeated test: `make test` runs the first `count`, and `make test-all` all."""
    return [pytest.param(number, marks=[] if number < count else [pytest.mark.full]) for number in range(of)]
