"""Delay of Ctrl-C while files are moved or removed."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """Handler of Ctrl-C: `hold()` delays it, `allow()` lets it raise, `restore()` returns to the earlier handler.

    A new object delays Ctrl-C. A Ctrl-C that raises delays the next ones, so that the cleanup is complete. Nothing
    changes outside the main thread, which alone gets Ctrl-C, or if Python does not handle it.
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
        """Delay Ctrl-C from now on."""
        self._allowed = False

    def allow(self) -> None:
        """Let Ctrl-C raise from now on; one that was delayed raises now."""
        self._allowed = True
        if self._waiting:
            self._waiting = False
            self._handle(signal.SIGINT, None)

    def restore(self, *, raising: bool) -> None:
        """Restore the earlier handler, which gets a delayed Ctrl-C, unless an error is already `raising`."""
        if self._before is None:
            return
        signal.signal(signal.SIGINT, self._before)
        if self._waiting and not raising:
            self._before(signal.SIGINT, None)
