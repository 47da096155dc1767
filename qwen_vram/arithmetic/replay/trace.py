"""The trace of a run: allocations and frees as events, in the order of the real run.

A consumer gets each event: `live_bytes` sums what is live at each named moment, and `allocator` follows torch's caching
allocator, for the bytes that it reserves. Nothing else says which tensors a run makes.
"""

from __future__ import annotations

from typing import Protocol


class Consumer(Protocol):
    """Receives the events of a run. A block is a number that the consumer gave out for a tensor."""

    def take(self, nbytes: int, /) -> int:
        """Allocate a tensor of `nbytes` and return its block."""

    def give(self, /, *blocks: int) -> None:
        """Free tensors."""

    def keep(self, nbytes: int, /) -> int:
        """Allocate a tensor of the KV cache and return its block."""

    def drop(self, /, *blocks: int) -> None:
        """Free tensors of the KV cache."""

    def at(self, moment: str, /) -> None:
        """Begin a moment, which ends with the next one; the empty name is for what belongs to no moment."""

    def state(self) -> object:
        """Return what decides about the events to come, to be compared with that of another time."""
