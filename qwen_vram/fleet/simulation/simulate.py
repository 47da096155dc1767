"""Simulation of one replica: continuous batching with chunked prefill, step by step.

A step has one token of each decoding sequence, and chunks of prompts up to the step's limit of tokens. A request is
admitted, first come, first served, if a sequence and the blocks for its prompt and its whole answer are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from math import ceil, sqrt
from typing import NamedTuple, Protocol

from qwen_vram.fleet.simulation.traffic import Request


class Steps(Protocol):
    """The times of steps, as `arithmetic.timing.batched_step.StepTimes` has them."""

    token_seconds: float

    def seconds(self, decoding: int, tokens: int, chunks: Iterable[tuple[int, int]] = (), ending: int = 0) -> float:
        """Seconds of one step; the arguments are those of `StepTimes.seconds`."""
        ...


class Limits(NamedTuple):
    """Limits of a replica.

    Attributes:
        blocks: Blocks of its KV cache.
        block_tokens: Tokens of a block.
        sequences: Sequences at once.
        step_tokens: Tokens of one step, of decoding sequences and of prompts together.
    """

    blocks: int
    block_tokens: int
    sequences: int
    step_tokens: int

    def blocks_of(self, tokens: int) -> int:
        """Return the blocks that a sequence of `tokens` tokens needs."""
        return -(-tokens // self.block_tokens)


class Served(NamedTuple):
    """A request with the seconds of its first and its last token."""

    request: Request
    first: float
    last: float

    @property
    def wait(self) -> float:
        """Seconds to the first token."""
        return self.first - self.request.arrival

    @property
    def speed(self) -> float:
        """Tokens a second after the first one; infinite for an answer of one token."""
        later = self.request.new_tokens - 1
        return later / (self.last - self.first) if later else float("inf")


class Run(NamedTuple):
    """The result of a simulation.

    Attributes:
        served: The requests in the order of their arrival.
        seconds: The end of the last step.
        busy: Seconds in which steps ran.
        request_seconds: The integral of the number of requests in the replica, waiting or running, over the time.
        steps: The number of steps.
        most_blocks: The most blocks that were taken at once.
        most_sequences: The most sequences that ran at once.
    """

    served: tuple[Served, ...]
    seconds: float
    busy: float
    request_seconds: float
    steps: int
    most_blocks: int
    most_sequences: int


class _Prompt:
    """A prompt that is fed in chunks."""

    __slots__ = ("number", "past", "request")

    def __init__(self, number: int, request: Request) -> None:
        self.number, self.request, self.past = number, request, 0


class _Replica:
    """The state of a replica between steps."""

    def __init__(self, requests: Sequence[Request], times: Steps, limits: Limits) -> None:
        self.requests, self.times, self.limits = requests, times, limits
        self.now, self.step, self.arrived = 0.0, 0, 0
        self.waiting: deque[int] = deque()
        self.prompts: list[_Prompt] = []
        self.ends: list[tuple[int, int]] = []  # (the step after whose end the answer is complete, request)
        self.tokens = 0  # that decoding sequences attend to in the next step
        self.taken = 0
        self.first = [0.0] * len(requests)
        self.last = [0.0] * len(requests)
        self.busy = self.request_seconds = 0.0
        self.most_blocks = self.most_sequences = 0

    def run(self) -> Run:
        done = 0
        while done < len(self.requests):
            self._arrive()
            self._admit()
            if not self.prompts and not self.ends:
                self._pass(self.requests[self.arrived].arrival - self.now)
                continue
            done += self._prefill_step() if self.prompts else self._decode_steps()
        served = zip(self.requests, self.first, self.last, strict=True)
        return Run(
            tuple(Served(*one) for one in served),
            self.now,
            self.busy,
            self.request_seconds,
            self.step,
            self.most_blocks,
            self.most_sequences,
        )

    def _arrive(self) -> None:
        while self.arrived < len(self.requests) and self.requests[self.arrived].arrival <= self.now:
            self.waiting.append(self.arrived)
            self.arrived += 1

    def _admit(self) -> None:
        """Admit waiting requests while the step has tokens, and the replica has sequences and blocks for them."""
        left = self.limits.step_tokens - len(self.ends)
        left -= sum(prompt.request.prompt_len - prompt.past for prompt in self.prompts)
        while self.waiting and left > 0 and len(self.prompts) + len(self.ends) < self.limits.sequences:
            request = self.requests[self.waiting[0]]
            needed = self.limits.blocks_of(request.prompt_len + request.new_tokens)
            if self.taken + needed > self.limits.blocks:
                break
            self.taken += needed
            self.prompts.append(_Prompt(self.waiting.popleft(), request))
            left -= request.prompt_len
        self.most_blocks = max(self.most_blocks, self.taken)
        self.most_sequences = max(self.most_sequences, len(self.prompts) + len(self.ends))

    def _prefill_step(self) -> int:
        """Run one step with chunks of prompts, and return the number of requests that it completes."""
        left = max(1, self.limits.step_tokens - len(self.ends))
        chunks, ending = [], []
        for prompt in self.prompts:
            new = min(left, prompt.request.prompt_len - prompt.past)
            if not new:
                break
            chunks.append((new, prompt.past))
            prompt.past += new
            left -= new
            if prompt.past == prompt.request.prompt_len:
                ending.append(prompt)
        decoding = len(self.ends)
        self._advance(self.times.seconds(decoding, self.tokens, chunks, len(ending)), 1)
        self.tokens += decoding
        done = self._complete()
        for prompt in ending:
            self.prompts.remove(prompt)
            self.first[prompt.number] = self.last[prompt.number] = self.now
            if prompt.request.new_tokens == 1:
                self.taken -= self.limits.blocks_of(prompt.request.prompt_len + 1)
                done += 1
            else:
                heappush(self.ends, (self.step + prompt.request.new_tokens - 1, prompt.number))
                self.tokens += prompt.request.prompt_len + 1
        return done

    def _decode_steps(self) -> int:
        """Run steps without prompts up to the next event, and return the number of requests that they complete."""
        decoding = len(self.ends)
        steps = self.ends[0][0] - self.step
        one = self.times.seconds(decoding, self.tokens)
        more = self.times.token_seconds * decoding  # each step attends to this number of tokens more
        if not self.waiting and self.arrived < len(self.requests):
            steps = min(steps, _steps_in(self.requests[self.arrived].arrival - self.now, one, more))
        self._advance(steps * one + more * steps * (steps - 1) / 2, steps)
        self.tokens += decoding * steps
        return self._complete()

    def _complete(self) -> int:
        done = 0
        while self.ends and self.ends[0][0] <= self.step:
            _, number = heappop(self.ends)
            request = self.requests[number]
            context = request.prompt_len + request.new_tokens
            self.last[number] = self.now
            self.taken -= self.limits.blocks_of(context)
            self.tokens -= context
            done += 1
        return done

    def _advance(self, seconds: float, steps: int) -> None:
        self.step += steps
        self.busy += seconds
        self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        """Let time pass, and count the requests in the replica; those that arrive meanwhile are counted from then."""
        inside = len(self.waiting) + len(self.prompts) + len(self.ends)
        end = self.now + seconds
        self.request_seconds += inside * seconds
        number = self.arrived
        while number < len(self.requests) and self.requests[number].arrival <= end:
            self.request_seconds += end - self.requests[number].arrival
            number += 1
        self.now = end


def _steps_in(seconds: float, one: float, more: float) -> int:
    """Return the number of steps that start before `seconds` have passed, at least 1.

    The first takes `one`, and each later one takes `more` than the one before.
    """
    if not more:
        return max(1, ceil(seconds / one))
    linear = one - more / 2
    return max(1, ceil((sqrt(linear * linear + 2 * more * max(seconds, 0.0)) - linear) / more))


def simulate(requests: Sequence[Request], times: Steps, limits: Limits) -> Run:
    """Run `requests`, which are in the order of their arrival, on one replica.

    Every request must fit alone: it is an error of the caller if its blocks are more than the replica has.
    """
    assert all(limits.blocks_of(one.prompt_len + one.new_tokens) <= limits.blocks for one in requests)
    return _Replica(requests, times, limits).run()


def without_load(request: tuple[int, int], times: Steps, limits: Limits) -> Served:
    """Return a request of (prompt, new) tokens that is alone on a replica."""
    return simulate([Request(0.0, *request)], times, limits).served[0]


def largest_below(most: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number up to `most` for which `holds`, which is monotone; 0 if it holds for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
