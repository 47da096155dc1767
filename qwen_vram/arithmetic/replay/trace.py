"""The trace of a run: allocations and frees as events, in the order of the real run.

A consumer gets each event. `live_bytes` sums the live bytes at each named moment, and `allocator` simulates torch's
caching allocator, for the bytes that it reserves. No other module describes the tensors of a run.
"""

from __future__ import annotations

from typing import Protocol


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
