"""The trace of a run: allocations and frees as events, in the order of the real run.

A consumer gets each event. `live_bytes` sums the live bytes at each named moment, and `allocator` simulates torch's
caching allocator, for the bytes that it reserves. No other module describes the tensors of a run. A layer's events are
recorded once, and run again for the layers, and the replays, that repeat them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Protocol

from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import ALLOCATION_STEP
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


class Consumer(Protocol):
    """Receives the events of a run. A block is a number that the consumer returned for a tensor."""

    def take(self, nbytes: int, /) -> int:
        """Allocate a tensor of `nbytes` and return its block."""

    def give(self, /, *blocks: int) -> None:
        """Free tensors."""

    def keep(self, nbytes: int, /) -> int:
        """Allocate a tensor of the KV cache and return its block."""

    def drop(self, /, *blocks: int) -> None:
        """Free tensors of the KV cache."""

    def at(self, moment: str, /) -> None:
        """Begin a moment, which ends with the next one; the empty name is for events that belong to no moment."""

    def state(self) -> object:
        """Return the state that determines the later events, to compare it with a later one."""


class LayerEvents(NamedTuple):
    """A layer's events, and `result`: the number of the one block that it leaves.

    An event from 0 on allocates that many bytes, which are rounded; blocks are numbered in this order. A negative event
    `~number` frees a block.
    """

    events: tuple[int, ...]
    result: int


class Recorder:
    """A consumer that writes down the events. A block is its number."""

    def __init__(self) -> None:
        self._events: list[int] = []
        self._blocks = 0

    def take(self, nbytes: int, /) -> int:
        """Write down an allocation."""
        self._events.append(-(-nbytes // ALLOCATION_STEP) * ALLOCATION_STEP or ALLOCATION_STEP)
        self._blocks += 1
        return self._blocks - 1

    def give(self, /, *blocks: int) -> None:
        """Write down frees."""
        self._events.extend(~block for block in blocks)

    # The cache's tensors are in the same pools.
    keep, drop = take, give

    def at(self, moment: str, /) -> None:
        """Ignore the moment, as the allocator does."""

    def state(self) -> object:
        """Return no state: one layer is not compared."""
        return None

    def recorded(self, run: Callable[[], int]) -> LayerEvents:
        """Return the events of `run`, which uses this consumer."""
        result = run()
        return LayerEvents(tuple(self._events), result)


@lru_cache(maxsize=8)
def known_layers(
    architecture: Architecture, profile: Profile, workload: Workload
) -> dict[tuple[int, int], LayerEvents]:
    """Return what is recorded of a generation, by queries and earlier tokens, for its replays under several limits."""
    return {}
