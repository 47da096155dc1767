"""Requests that arrive at a fleet: at random times, or at the times that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from random import Random
from typing import NamedTuple

from qwen_vram.errors import WorkloadError
from qwen_vram.fleet.simulation.lengths import Distribution


class Request(NamedTuple):
    """A request: the second of its arrival, and its tokens."""

    arrival: float
    prompt_len: int
    new_tokens: int


def poisson(
    rate: float, number: int, prompts: Distribution, answers: Distribution, *, seed: int, replica: int = 0
) -> list[Request]:
    """Return requests that arrive independently of each other, `rate` a second.

    Replicas get independent requests, as if a balancer sends each request to a random replica.
    """
    random = Random(f"{seed}/{replica}")
    requests, now = [], 0.0
    for _ in range(number):
        now += random.expovariate(rate)
        requests.append(Request(now, prompts.draw(random), answers.draw(random)))
    return requests


def given(
    arrivals: Sequence[float], replicas: int, prompts: Distribution, answers: Distribution, *, seed: int
) -> list[list[Request]]:
    """Return the requests of each replica for the caller's arrivals, each sent to a random replica.

    Lists of samples that are as long as `arrivals` are the lengths of these requests, in order.
    """
    random = Random(f"{seed}/given")
    parts: list[list[Request]] = [[] for _ in range(replicas)]
    alike = all(len(one.samples) in (0, len(arrivals)) for one in (prompts, answers))
    for number, arrival in enumerate(arrivals):
        lengths = [one.samples[number] if alike and one.samples else one.draw(random) for one in (prompts, answers)]
        parts[random.randrange(replicas)].append(Request(arrival, *lengths))
    return parts


def check_arrivals(arrivals: Sequence[float]) -> None:
    """Refuse arrivals that are no times, or that are not in order.

    Raises:
        WorkloadError: fewer than two arrivals, one that is not a finite number of at least 0, or one before another.
    """
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) and isfinite(one) for one in arrivals)
    if len(arrivals) < 2 or not numbers or arrivals[0] < 0 or list(arrivals) != sorted(arrivals):
        raise WorkloadError(
            f"arrivals must be at least two times in seconds, from 0, in order; got {len(arrivals)} values; pass a "
            "sorted list of numbers",
            name="arrivals",
            got=len(arrivals),
        )
