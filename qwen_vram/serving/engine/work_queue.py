"""The queue of requests: bounded, in order of arrival, with cancellation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock
from typing import Protocol

from qwen_vram.serving.wire.events import Event, Failed
from qwen_vram.serving.wire.problem import ApiError

# Bounds of `Retry-After`, in seconds, and the time of a request before one was measured.
_SOONEST, _LATEST, _UNKNOWN = 1, 600, 5.0
# The weight of the newest request in the mean time of requests.
_NEWEST = 0.2


class Stoppable(Protocol):
    """A generation that can be stopped without waiting."""

    def stop(self) -> None:
        """Stop at the next token."""


class Handle:
    """A request in the queue or in work.

    Args:
        run: The work, which the engine's thread calls with this handle.
        deliver: Takes an event; any thread may call it.
        places: The number of its answers, which run together if there are places for all.

    Attributes:
        cancelled: Nobody reads further events.
        begun: The request left the queue.
    """

    def __init__(self, run: Callable[[Handle], None], deliver: Callable[[Event], None], places: int = 1) -> None:
        self.run = run
        self.deliver = deliver
        self.places = places
        self.cancelled = False
        self.begun = False
        self._queue: WorkQueue | None = None
        self._running: tuple[Stoppable, ...] = ()
        self._failed = False
        self._lock = Lock()

    @property
    def position(self) -> int:
        """Requests before this one in the queue; 0 if it runs or is over."""
        return 0 if self._queue is None else self._queue.position(self)

    def cancel(self) -> None:
        """Give up: leave the queue, or stop at the next token. Any thread may call this, and it does not wait."""
        self.cancelled = True
        if self._queue is not None:
            self._queue.remove(self)
        self._stop()

    def fail(self, error: ApiError) -> None:
        """End the request with an error, as `cancel` for the rest; a second error changes nothing."""
        with self._lock:
            if self._failed or self.cancelled:
                return
            self._failed = True
        self.deliver(Failed(error))
        self.cancel()

    def runs(self, *generations: Stoppable) -> None:
        """Note the generations that run now, and stop them if the request was cancelled."""
        self._running = generations
        if self.cancelled:
            self._stop()

    def queued_in(self, queue: WorkQueue) -> None:
        """Note the queue that this request waits in."""
        self._queue = queue

    def _stop(self) -> None:
        for generation in self._running:
            generation.stop()


class WorkQueue:
    """A first-in, first-out queue with at most `most` waiting requests.

    Attributes:
        places: The answers that run at once. A request with more answers takes all places.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.places = self._free = 1
        self._waiting: deque[Handle] = deque()
        self._changed = Condition()
        self._closed: ApiError | None = None
        self._mean_seconds = _UNKNOWN

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self, places: int) -> None:
        """Set the number of places, before the first request."""
        self.places = self._free = places

    def put(self, handle: Handle) -> None:
        """Add a request.

        Raises:
            ApiError: the queue is full (429), or closed.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if len(self._waiting) >= self.most + self._free:  # a free place takes one at once
                raise self.full()
            handle.queued_in(self)
            self._waiting.append(handle)
            self._changed.notify_all()

    def take(self) -> Handle | None:
        """Wait for the next request and its places, and remove it; `None` if the queue is closed and empty."""
        with self._changed:
            while not self._may_begin() and self._closed is None:
                self._changed.wait()
            if not self._waiting:
                return None
            self._free -= self._needed(self._waiting[0])
            return self._waiting.popleft()

    def remove(self, handle: Handle) -> None:
        """Remove a waiting request; others change nothing."""
        with self._changed:
            if handle in self._waiting:
                self._waiting.remove(handle)
                self._changed.notify_all()

    def position(self, handle: Handle) -> int:
        """Return the number of requests before a waiting one; 0 for others."""
        with self._changed:
            return self._waiting.index(handle) if handle in self._waiting else 0

    def close(self, error: ApiError) -> None:
        """Refuse further requests, and end waiting ones with `error`."""
        with self._changed:
            self._closed = self._closed or error
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for handle in waiting:
            handle.fail(error)

    def over(self, handle: Handle, seconds: float) -> None:
        """Take back the places of a request, and note its time for `retry_after`."""
        with self._changed:
            self._free += self._needed(handle)
            self._mean_seconds += _NEWEST * (seconds - self._mean_seconds)
            self._changed.notify_all()

    def retry_after(self) -> int:
        """Return the seconds after which a place may be free, by the mean time of recent requests."""
        return max(_SOONEST, min(_LATEST, math.ceil(self._mean_seconds / self.places)))

    def _may_begin(self) -> bool:
        return bool(self._waiting) and self._needed(self._waiting[0]) <= self._free

    def _needed(self, handle: Handle) -> int:
        return min(handle.places, self.places)

    def full(self) -> ApiError:
        """Return the error of a full queue."""
        return ApiError(
            429,
            f"{self.most:,} requests wait already, which is the most here; try again later",
            code="queue_full",
            headers={"Retry-After": str(self.retry_after())},
        )
