"""The search: for each card and format, the fewest GPUs whose simulation fulfils the wish."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import ceil
from random import Random
from typing import NamedTuple

from qwen_vram.fleet.question import Question
from qwen_vram.fleet.replica import Replica
from qwen_vram.fleet.simulation.service import Service, Wish, measure, nearest_wish
from qwen_vram.fleet.simulation.simulate import Run, largest_below, simulate
from qwen_vram.fleet.simulation.traffic import Request, given, poisson

# Requests that one simulation measures, and replicas that share them. Replicas with random arrivals are independent.
_MEASURED, _SIMULATED = 1000, 4
# Requests that are simulated alone, to see if any number of replicas fulfils the wish.
_ALONE = 200
# The first number of replicas that is simulated, as a share of the one for the mean load.
_START = 0.7
# Replicas for each user beyond which no more are tried.
_MOST_FOR_A_USER = 4


class Found(NamedTuple):
    """The fewest replicas that fulfil the wish, with their service; otherwise the nearest wish that they fulfil.

    Attributes:
        replicas: The number of replicas; 0 if no number fulfils the wish.
        service: Their service; that of the most replicas if no number fulfils it.
        nearest: The nearest wish that `tried` replicas fulfil; `None` if the wish itself is fulfilled.
        tried: The most replicas that were simulated if the wish is not fulfilled; 0 is no load.
        users: The most users for whom these replicas fulfil the wish itself; 0 for given arrivals.
    """

    replicas: int
    service: Service
    nearest: Wish | None = None
    tried: int = 0
    users: int = 0


def fewest_replicas(question: Question, replica: Replica, most: int | None, enough: int | None = None) -> Found | None:
    """Return the fewest replicas, up to `most`, that fulfil the wish.

    Args:
        most: The most replicas that the caller has; `None` is any number.
        enough: A number of replicas that another option is better than: the search gives up there.

    Returns:
        `None` if the answer is at least `enough`.
    """
    alone = _without_load(question, replica)
    if alone.service.share < question.wish.share:
        return alone
    least = max(1, int(_START * mean_replicas(question, replica)))
    if enough is not None and least >= enough:
        return None
    known: dict[int, Found] = {}

    def tried(replicas: int) -> Found:
        if replicas not in known:
            known[replicas] = _simulated(question, replica, replicas)
        return known[replicas]

    def fulfils(replicas: int) -> bool:
        return tried(replicas).nearest is None

    limit = min(_MOST_FOR_A_USER * question.users, most or 2**62)
    low, high = 0, min(limit, least)
    while not fulfils(high):
        if high == limit:
            return known[high]._replace(users=_most_users(question, replica, high))
        if enough is not None and high >= enough:
            return None
        low, high = high, min(limit, high + max(1, high // 3))
    fewest = high - largest_below(high - low - 1, lambda fewer: fulfils(high - fewer))
    return tried(fewest)


def _most_users(question: Question, replica: Replica, replicas: int) -> int:
    """Return the most users for whom a number of replicas fulfils the wish."""
    if question.arrivals is not None:
        return 0

    def fulfils(users: int) -> bool:
        fewer = question._replace(users=users, rate=question.rate * users / question.users)
        return _simulated(fewer, replica, replicas).nearest is None

    return largest_below(question.users - 1, fulfils)


def mean_replicas(question: Question, replica: Replica) -> float:
    """Return the replicas that the mean load needs, by the time of a step with the most sequences that are fast enough.

    It leaves out that arrivals are random.
    """
    context = question.prompts.mean + question.answers.mean / 2
    prompt = _prompt_seconds(question, replica)

    def step(sequences: int) -> float:
        decoding = replica.times.seconds(sequences, round(sequences * context))
        return decoding + sequences / question.answers.mean * prompt

    limit = 1 / question.wish.tokens_per_second
    sequences = max(1, largest_below(replica.limits.sequences, lambda count: step(count) <= limit))
    return question.rate * question.answers.mean * step(sequences) / sequences


def _prompt_seconds(question: Question, replica: Replica) -> float:
    """Return the time that the mean prompt adds to steps: its rows and its attention, without reading the weights."""
    tokens = round(question.prompts.mean)
    whole = replica.times.seconds(0, 0, [(tokens, 0)])
    return max(0.0, whole - replica.times.without_attention(1, 0))


def _simulated(question: Question, replica: Replica, replicas: int) -> Found:
    runs, skip = tuple(_runs(question, replica, replicas)), _skip(question, replicas)
    service = measure(runs, question.wish, replicas, skip=skip)
    if service.share >= question.wish.share:
        return Found(replicas, service)
    return Found(0, service, nearest_wish(runs, question.wish, skip=skip), replicas)


def _runs(question: Question, replica: Replica, replicas: int) -> Iterator[Run]:
    if question.arrivals is not None:
        lengths = question.prompts, question.answers
        parts = given(question.arrivals, replicas, *lengths, seed=question.seed)
        yield from (simulate(part, replica.times, replica.limits) for part in parts if part)
        return
    simulated = min(replicas, _SIMULATED)
    number = ceil(_MEASURED / simulated) + 2 * _skip(question, replicas)
    for one in range(simulated):
        requests = poisson(
            question.rate / replicas, number, question.prompts, question.answers, seed=question.seed, replica=one
        )
        yield simulate(requests, replica.times, replica.limits)


def _skip(question: Question, replicas: int) -> int:
    """Return the requests that fill a replica, which are not measured; none of the caller's arrivals is left out."""
    return 0 if question.arrivals is not None else max(10, ceil(question.users / replicas))


def _without_load(question: Question, replica: Replica) -> Found:
    """Return the service of requests that are alone on a replica."""
    random = Random(f"{question.seed}/alone")
    lengths = [(question.prompts.draw(random), question.answers.draw(random)) for _ in range(_ALONE)]

    @cache
    def alone(one: tuple[int, int]) -> Run:
        return simulate([Request(0.0, *one)], replica.times, replica.limits)

    runs = [alone(one) for one in lengths]
    service = measure(runs, question.wish, 1)
    if service.share >= question.wish.share:
        return Found(0, service)
    return Found(0, service, nearest_wish(runs, question.wish), 0)
