"""Jobs: each generation waits for its turn in its own thread, and runs in a runner.

A generation runs to its end, or to the next token after it is stopped, independently of its caller.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Event, Thread
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

from qwen_vram.runtime.memory.release import forget_frames
from qwen_vram.runtime.scheduling.runner import runner
from qwen_vram.runtime.scheduling.turns import LOOK_SECONDS, Turn, Turns

Result = TypeVar("Result")

# The time that an interrupted caller waits for its generation, which ends with the next token. A second Ctrl-C ends the
# wait. A longer forward pass continues to its end, and the next generation waits for it.
_PATIENCE_SECONDS = 10.0


_STARTED: WeakSet[Job[Any]] = WeakSet()


class Job(Generic[Result]):
    """One generation: `work`, called with its turn, in a runner.

    Args:
        work: A function that must end soon after `Turn.stopped` is set.
        device: The device of the runner, which uses the CUDA stream of the thread that starts the job.
        ended: Called in the job's thread after the turn is over.
        deadline: As for `Turn`.
    """

    def __init__(
        self,
        turns: Turns,
        work: Callable[[Turn], Result],
        device: torch.device,
        ended: Callable[[], object] | None = None,
        deadline: float | None = None,
    ) -> None:
        self._turns, self._turn = turns, Turn(deadline)
        self._work: Callable[[Turn], Result] | None = work
        self._ended = ended
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._joined, self._over = Event(), Event()
        self._results: list[Result] = []
        self._errors: list[BaseException] = []

    def start(self) -> None:
        """Start the thread, and return when it has its place in the queue.

        Raises:
            QwenVramError: this thread runs a generation of the model, which would wait for itself.
        """
        self._turns.refuse_inside("another generation cannot start")
        if self._device.type == "cuda":
            self._stream = torch.cuda.current_stream(self._device)
        try:
            Thread(target=self._run, name="qwen-vram generation", daemon=True).start()
            self._joined.wait()
        except BaseException:  # the thread may or may not run
            self.stop("was stopped by an interrupt of its caller")
            raise

    def result(self) -> Result:
        """Return the result of `work`, or raise its error. An interrupt of this wait stops the job."""
        try:
            while not self._over.wait(LOOK_SECONDS):  # an interrupted join() of a thread assumes its end
                pass
        except BaseException:
            self.stop("was stopped by an interrupt of its caller")
            self._over.wait(_PATIENCE_SECONDS)
            raise
        self.check()
        return self._results.pop()

    def check(self) -> None:
        """Raise the error of `work`, once."""
        if self._errors:
            raise self._errors.pop()

    def stop(self, why: str) -> None:
        """Stop the job; `why` is a text as for `Turn.stopped`."""
        self._turn.stopped = self._turn.stopped or why
        self._turns.wake()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of a started job; its own thread does not wait for itself."""
        if self._turn.thread is not threading.current_thread():
            self._over.wait(timeout)

    def _run(self) -> None:
        """Run the job's thread."""
        _STARTED.add(self)
        try:
            try:
                self._turns.join(self._turn)
            finally:
                self._joined.set()
            self._turns.wait(self._turn)
            with runner() as one:
                self._results.append(one.run(self._compute))
        except BaseException as error:  # raised by `check`
            forget_frames(error)
            self._errors.append(error)
        finally:
            self._work = None
            self._turn.done = True
            self._turns.wake()
            self._over.set()
            if self._ended is not None:
                self._ended()

    def _compute(self) -> Result:
        """Run the work, in the runner's thread."""
        assert self._work is not None
        self._turn.thread = threading.current_thread()
        with self._place():
            return self._work(self._turn)

    def _place(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


@atexit.register
def _stop_all() -> None:
    """End running jobs when the interpreter ends: a thread that returns from PyTorch later aborts the process."""
    for job in list(_STARTED):
        job.stop("was stopped by the end of the process")
    for job in list(_STARTED):
        job.join(_PATIENCE_SECONDS)
