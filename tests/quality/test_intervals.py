"""Intervals of shares by values that were published, and verdicts at their thresholds."""

import pytest

from qwen_vram.quality.intervals import Figure, share
from qwen_vram.quality.verdict import verdict

pytestmark = pytest.mark.no_torch


@pytest.mark.parametrize(
    # Source of the first three: R. G. Newcombe, Statistics in Medicine 17, 1998, table I, method 3.
    ("right", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_wilsons_interval(right, asked, low, high):
    found = share(right, asked)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(
    ("value", "high", "word"),
    [
        (0.0, 0.0, "identical"),
        (0.001, 0.0099, "excellent"),
        (0.001, 0.01, "good"),
        (0.02, 0.0499, "good"),
        (0.04, 0.05, "acceptable"),
        (0.05, 0.2, "poor"),
    ],
)
def test_the_verdict_is_that_of_the_upper_end(value, high, word):
    assert verdict(Figure(value, 0.0, high)) == word


def test_intervals_that_touch_overlap():
    assert Figure(1, 0, 2).overlaps(Figure(3, 2, 4))
    assert not Figure(1, 0, 2).overlaps(Figure(3, 2.1, 4))
