"""Ctrl-C held back while something is put in place or taken away."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """Says when Ctrl-C may raise: `allow()` lets it, `hold()` keeps it waiting, `restore()` hands it back.

    Made holding. A Ctrl-C that raises holds the next ones, so that what it ends is cleaned up whole. Outside the main
    thread, which alone gets Ctrl-C, and where Python does not handle it, nothing changes.
    """

    def __init__(self) -> None:
        self._allowed = False
        self._waiting = False
        before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        self._before = before if main and callable(before) else None
        if self._before is not None:
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._before is not None and self._allowed:
            self._allowed = False
            self._before(number, frame)
        else:
            self._waiting = True

    def hold(self) -> None:
        """From here on Ctrl-C waits."""
        self._allowed = False

    def allow(self) -> None:
        """From here on Ctrl-C raises; one that waited raises now."""
        self._allowed = True
        if self._waiting:
            self._waiting = False
            self._handle(signal.SIGINT, None)

    def restore(self, *, raising: bool) -> None:
        """Put the earlier handler back; one that waited reaches it, unless an error is on its way out already."""
        if self._before is None:
            return
        signal.signal(signal.SIGINT, self._before)
        if self._waiting and not raising:
            self._before(signal.SIGINT, None)
