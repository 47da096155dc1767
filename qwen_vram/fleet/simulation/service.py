"""The service of a fleet: the wish of the users, and what a simulation measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from qwen_vram.fleet.simulation.simulate import Run, Served

PERCENTILES = (50, 90, 99)


class Wish(NamedTuple):
    """The wish of a request's user.

    Attributes:
        tokens_per_second: The least rate of tokens after the first one.
        first_token_seconds: The most seconds to the first token.
        share: The least share of requests that get both.
    """

    tokens_per_second: float
    first_token_seconds: float
    share: float

    def met_by(self, served: Served) -> bool:
        """Tell if a request got both."""
        return served.wait <= self.first_token_seconds and served.speed >= self.tokens_per_second


class Service(NamedTuple):
    """The service of a fleet in a simulation.

    Attributes:
        requests: The number of measured requests.
        share: The share of requests that got what was wished.
        user_tokens_per_second: Percentiles of a request's rate: 10 is what nine of ten requests exceed.
        first_token_seconds: Percentiles of the time to the first token.
        total_tokens_per_second: New tokens of all replicas a second, at this load.
        most_sequences: The most sequences that ran at once on one replica.
        busy: The share of the time in which steps ran.
    """

    requests: int
    share: float
    user_tokens_per_second: dict[int, float]
    first_token_seconds: dict[int, float]
    total_tokens_per_second: float
    most_sequences: int
    busy: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with percentiles by names such as `p50`."""
        named = {
            name: {f"p{percent}": round(value, 4) for percent, value in getattr(self, name).items()}
            for name in ("user_tokens_per_second", "first_token_seconds")
        }
        return {**self._asdict(), **named}


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of all values do not exceed.

    >>> percentile([1, 2, 3, 4], 50), percentile([1, 2, 3, 4], 51)
    (2, 3)
    """
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def measure(runs: Sequence[Run], wish: Wish, replicas: int, *, skip: int = 0) -> Service:
    """Return the service of `replicas` replicas, of which `runs` were simulated.

    Args:
        skip: Requests at the start and at the end of each run that are not measured: a replica that fills up or that
            empties is not at its load.
    """
    measured = [one for run in runs for one in run.served[skip : len(run.served) - skip]]
    waits = [one.wait for one in measured]
    speeds = [one.speed for one in measured]
    rates = [_rate(run, skip) for run in runs]
    return Service(
        requests=len(measured),
        share=sum(map(wish.met_by, measured)) / len(measured),
        user_tokens_per_second={100 - percent: -percentile([-s for s in speeds], percent) for percent in PERCENTILES},
        first_token_seconds={percent: percentile(waits, percent) for percent in PERCENTILES},
        total_tokens_per_second=replicas * sum(rates) / len(rates),
        most_sequences=max(run.most_sequences for run in runs),
        busy=sum(run.busy for run in runs) / sum(run.seconds for run in runs),
    )


def nearest_wish(runs: Sequence[Run], wish: Wish, *, skip: int = 0) -> Wish:
    """Return the nearest wish that these runs fulfil, for the same share of requests.

    The time to the first token is relaxed as little as its own percentile allows, and the rate likewise.
    """
    measured = [one for run in runs for one in run.served[skip : len(run.served) - skip]]
    least = wish.first_token_seconds
    if sum(one.wait <= least for one in measured) < wish.share * len(measured):
        least = percentile([one.wait for one in measured], 100 * wish.share)
    # Requests that wait longer do not count, so the rate is that of the others.
    in_time = sorted((one.speed for one in measured if one.wait <= least), reverse=True)
    needed = max(1, int(-(-wish.share * len(measured) // 1)))
    return Wish(min(wish.tokens_per_second, in_time[min(needed, len(in_time)) - 1]), least, wish.share)


def _rate(run: Run, skip: int) -> float:
    """Return the new tokens a second of one run, of the answers that end between its first and last measured arrival.

    Where all requests arrive at once, it is over the whole run.
    """
    measured = run.served[skip : len(run.served) - skip]
    start, end = measured[0].request.arrival, measured[-1].request.arrival
    if end == start:
        start, end = 0.0, run.seconds
    return sum(one.request.new_tokens for one in run.served if start < one.last <= end) / (end - start)
