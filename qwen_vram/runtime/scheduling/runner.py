"""Runners: threads in which generations compute, kept for the next one.

torch gives each thread a cuBLAS handle of its own, and each handle a workspace that stays allocated. A handle goes back
into torch's pool some time after its thread has ended. One thread for one generation after the other therefore keeps
one workspace, whatever its callers' threads do.
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
    """One call of `work`, and what it came to."""

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
    """One thread, which makes calls one after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        Thread(target=self._serve, name="qwen-vram runner", daemon=True).start()

    def run(self, work: Callable[[], Result]) -> Result:
        """Call `work` in the thread, and return what it returns, or raise what it raises."""
        call = _Call(work)
        self._calls.put(call)
        call.over.wait()
        error, result = call.error, call.result
        call.error = call.result = None
        try:
            if error is not None:
                raise error
        finally:
            del error  # or the frame would refer to itself
        return result  # type: ignore[no-any-return]

    def _serve(self) -> None:
        """The thread. It refers to no call while it waits for the next one."""
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
    """Lend a runner: the one that was given back last, so that there are as few as generations at a time."""
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
