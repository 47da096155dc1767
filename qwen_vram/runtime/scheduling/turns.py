"""Turns: one generation of a model at a time, in the order in which callers asked for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from typing import TypeVar

from qwen_vram.errors import GenerationStoppedError, QwenVramError

Result = TypeVar("Result")

# A thread that waits looks after this time even if nothing woke it: a signal may come between two steps of a wake-up,
# and an interrupt without a signal (`_thread.interrupt_main`, Ctrl-C on Windows) wakes nobody.
LOOK_SECONDS = 0.05

CLOSED = "this model is closed; load it again"


class Turn:
    """The place of one generation in the line.

    Attributes:
        stopped: Why the generation has to end now, as the words after "the generation"; empty if nobody stopped it.
        done: The turn is over. One assignment sets it, so that no signal can come between: see `Turns.wake`.
        thread: The thread that runs the generation, from its first step on.
    """

    def __init__(self) -> None:
        self.stopped = ""
        self.done = False
        self.thread: Thread | None = None

    def check(self, tokens: int = 0) -> None:
        """Raise `GenerationStoppedError` if somebody stopped this generation, which has made `tokens` tokens so far."""
        if self.stopped:
            raise GenerationStoppedError(f"the generation {self.stopped} after {tokens:,} new tokens", tokens=tokens)


class Turns:
    """A first-in, first-out lock over a model's generations, which another thread can stop or close.

    The lock of `_changed` is reentrant: the garbage collector may drop a stream, which stops its turn, on any line.

    Attributes:
        closed: No turn is given any more.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._line: deque[Turn] = deque()
        self.closed = False

    def join(self, turn: Turn) -> None:
        """Put `turn` at the end of the line.

        Raises:
            QwenVramError: the model is closed.
        """
        with self._changed:
            if self.closed:
                raise QwenVramError(CLOSED)
            self._line.append(turn)

    def wait(self, turn: Turn) -> None:
        """Wait until `turn` is the first in the line, and take it for this thread.

        Raises:
            GenerationStoppedError: somebody stopped this generation in the meantime.
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
        """Let the threads that wait look again, after `done` or `stopped` of a turn was set."""
        with self._changed:
            self._changed.notify_all()

    def run(self, work: Callable[[], Result]) -> Result:
        """Call `work` in a turn of this thread, and return what it returns. `stop` does not end it.

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
        """Stop the generation that runs now, if there is one; `why` is as `Turn.stopped`."""
        with self._changed:
            running = self._first()
            if running is not None:
                running.stopped = running.stopped or why

    def close(self) -> None:
        """Stop the generation that runs, refuse those that wait and those to come, and return when all have ended.

        Raises:
            QwenVramError: this thread runs a generation of the model now, which would wait for itself.
        """
        with self._changed:
            self.refuse_inside("close() cannot run")
            self.closed = True
            self.stop("was stopped by close() of its model")
            self._changed.notify_all()
            while self._first() is not None:
                self._changed.wait(LOOK_SECONDS)

    def refuse_inside(self, what: str) -> None:
        """Refuse `what`, the beginning of a message, in the thread that runs a generation: it would wait for itself.

        Raises:
            QwenVramError: this is that thread.
        """
        with self._changed:
            running = self._first()
            inside = running is not None and running.thread is threading.current_thread()
        if inside:
            raise QwenVramError(
                f"{what} inside a generation of the same model (in a logits processor, stopping criterion, streamer or "
                "hook), because it would wait for itself; use stop() there, or wait until the generation has ended"
            )

    def _first(self) -> Turn | None:
        """The turn that runs, or may run next; turns that are over are forgotten."""
        while self._line:
            turn = self._line[0]
            if not turn.done:
                return turn
            self._line.popleft()
        return None
