"""Runners: threads in which generations compute, reused by later ones.

torch gives each thread a cuBLAS handle, and each handle a workspace that stays allocated. A handle returns to torch's
pool some time after its thread has ended. One thread for successive generations therefore keeps one workspace,
independently of the callers' threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Call:
    """One call of `work`, and its result or error."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work: Callable[[], Any] | None = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.over = Event()

    def run(self) -> None:
        assert self.work is not None
        try:
            self.result = self.work()
        except BaseException as error:  # raised by `Runner.run`
            self.error = error
        finally:
            self.work = None


class Runner:
    """One thread, which runs calls one after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        Thread(target=self._serve, name="qwen-vram runner", daemon=True).start()

    def run(self, work: Callable[[], Result]) -> Result:
        """Call `work` in the thread, and return its result or raise its error."""
        call = _Call(work)
        self._calls.put(call)
        call.over.wait()
        error, result = call.error, call.result
        call.error = call.result = None
        try:
            if error is not None:
                raise error
        finally:
            del error  # otherwise the frame would refer to itself
        return result  # type: ignore[no-any-return]

    def _serve(self) -> None:
        """Run the thread. It refers to no call while it waits for the next one."""
        while True:
            call = self._calls.get()
            call.run()
            over = call.over
            del call
            over.set()
            del over


_IDLE: list[Runner] = []


@contextmanager
def runner() -> Iterator[Runner]:
    """Lend a runner: the one returned last, so there is one runner for each parallel generation."""
    try:
        one = _IDLE.pop()
    except IndexError:
        one = Runner()
    try:
        yield one
    finally:
        _IDLE.append(one)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_IDLE.clear)  # a child process has none of its parent's threads
