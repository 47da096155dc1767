"""Turns: one generation of a model at a time, first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from time import monotonic
from typing import TypeVar

from qwen_vram.errors import GenerationStoppedError, QwenVramError

Result = TypeVar("Result")

# A waiting thread checks again after this time without a wake-up. A signal may come between two steps of a wake-up, and
# an interrupt without a signal (`_thread.interrupt_main`, Ctrl-C on Windows) wakes no thread.
LOOK_SECONDS = 0.05

OVERDUE = "was stopped by its deadline"
CLOSED = "this model is closed; load it again"


class Turn:
    """The place of one generation in the queue.

    Args:
        deadline: The value of `time.monotonic()` from which the generation must end.

    Attributes:
        stopped: The reason why the generation must end, as the words after "the generation"; empty if it may continue.
        done: The turn is over. One assignment sets it, so that no signal can come between: see `Turns.wake`.
        thread: The thread that runs the generation, from its first step on.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._stopped = ""
        self._deadline = deadline
        self.done = False
        self.thread: Thread | None = None

    @property
    def stopped(self) -> str:
        """The reason, as the class says."""
        if not self._stopped and self._deadline is not None and monotonic() > self._deadline:
            self._stopped = OVERDUE
        return self._stopped

    @stopped.setter
    def stopped(self, why: str) -> None:
        self._stopped = why

    def check(self, tokens: int = 0) -> None:
        """Raise `GenerationStoppedError` if the generation, with `tokens` tokens so far, was stopped."""
        if self.stopped:
            raise GenerationStoppedError(f"the generation {self.stopped} after {tokens:,} new tokens", tokens=tokens)


class Turns:
    """A first-in, first-out lock over a model's generations, which another thread can stop or close.

    The lock of `_changed` is reentrant: the garbage collector may drop a stream, which stops its turn, on any line.

    Attributes:
        closed: No further turn is given.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._line: deque[Turn] = deque()
        self.closed = False

    def join(self, turn: Turn) -> None:
        """Put `turn` at the end of the queue.

        Raises:
            QwenVramError: the model is closed.
        """
        with self._changed:
            if self.closed:
                raise QwenVramError(CLOSED)
            self._line.append(turn)

    def wait(self, turn: Turn) -> None:
        """Wait until `turn` is the first in the queue, and take it for this thread.

        Raises:
            GenerationStoppedError: this generation was stopped in the meantime.
            QwenVramError: the model was closed in the meantime.
        """
        with self._changed:
            while not self.closed and not turn.stopped and self._first() is not turn:
                self._changed.wait(LOOK_SECONDS)
            if self.closed:
                raise QwenVramError(CLOSED)
            turn.check()
            turn.thread = threading.current_thread()

    def wake(self) -> None:
        """Let waiting threads check again, after `done` or `stopped` of a turn was set."""
        with self._changed:
            self._changed.notify_all()

    def run(self, work: Callable[[], Result]) -> Result:
        """Call `work` in a turn of this thread, and return its result. `stop` does not end it.

        Raises:
            QwenVramError: as for `refuse_inside`, `join` and `wait`.
        """
        turn = Turn()
        self.refuse_inside("this cannot run")
        try:
            self.join(turn)
            self.wait(turn)
            return work()
        finally:
            turn.done = True
            self.wake()

    def stop(self, why: str) -> None:
        """Stop the running generation, if there is one; `why` is a text as for `Turn.stopped`."""
        with self._changed:
            running = self._first()
            if running is not None:
                running.stopped = running.stopped or why

    def close(self) -> None:
        """Stop the running generation, refuse waiting and later ones, and return when all have ended.

        Raises:
            QwenVramError: this thread runs a generation of the model, which would wait for itself.
        """
        with self._changed:
            self.refuse_inside("close() cannot run")
            self.closed = True
            self.stop("was stopped by close() of its model")
            self._changed.notify_all()
            while self._first() is not None:
                self._changed.wait(LOOK_SECONDS)

    def refuse_inside(self, what: str) -> None:
        """Refuse `what`, the beginning of a message, in the thread of a running generation: it would wait for itself.

        Raises:
            QwenVramError: the caller is in that thread.
        """
        if self.is_inside():
            raise QwenVramError(
                f"{what} inside a generation of the same model (in a logits processor, stopping criterion, streamer or "
                "hook), because it would wait for itself; use stop() there, or wait until the generation has ended"
            )

    def is_inside(self) -> bool:
        """Tell if the caller is in the thread of the running generation."""
        with self._changed:
            running = self._first()
            return running is not None and running.thread is threading.current_thread()

    def _first(self) -> Turn | None:
        """Return the turn that runs, or may run next, and remove turns that are over."""
        while self._line:
            turn = self._line[0]
            if not turn.done:
                return turn
            self._line.popleft()
        return None
