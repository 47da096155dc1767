"""The controlling terminal: its foreground group, lent to a program and taken back.

Only the foreground group may read the terminal, and only it gets the signals of Ctrl-C and Ctrl-Z.
"""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Terminal:
    """The controlling terminal of this process, or none. Without one, each method does nothing.

    Attributes:
        exists: This process has a controlling terminal. Its standard input may be another file.
    """

    def __init__(self, number: int | None) -> None:
        self._number = number
        self.exists = number is not None
        # A pager behind a pipe is in this process's group. The program then gets the terminal only if it needs it.
        self._shared = not _is_terminal(sys.stdout)
        self._modes = None if number is None else _modes_of(number)

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Terminal]:
        """Open the terminal. Until the end, this process may change its foreground group also from the background."""
        try:
            number = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        except OSError:  # no controlling terminal: a container, a service
            yield cls(None)
            return
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            yield cls(number)
        finally:
            signal.signal(signal.SIGTTOU, before)
            os.close(number)

    def is_held_by(self, *groups: int) -> bool:
        """Tell if one of these process groups is in the foreground."""
        return self._holder() in groups

    def can_lend(self) -> bool:
        """Tell if this process's group is in the foreground, and surely without a pager."""
        return not self._shared and self.is_held_by(os.getpgrp())

    def give(self, group: int) -> None:
        """Put `group` in the foreground."""
        if self._number is not None:
            with suppress(OSError):  # the terminal is closed, or the group has ended
                os.tcsetpgrp(self._number, group)

    def take_back(self, group: int) -> None:
        """Put this process's group in the foreground, if `group` is there, or a group that has ended."""
        holder = self._holder()
        if holder == group or (holder is not None and not _has_member(holder)):
            self.give(os.getpgrp())

    def restore_modes(self) -> None:
        """Set the modes that the terminal had at first, such as echo, if this process's group is in the foreground."""
        if self._number is not None and self._modes is not None and self.is_held_by(os.getpgrp()):
            with suppress(termios.error):
                termios.tcsetattr(self._number, termios.TCSANOW, self._modes)

    def _holder(self) -> int | None:
        if self._number is None:
            return None
        try:
            return os.tcgetpgrp(self._number)
        except OSError:  # the terminal is closed
            return None


def _modes_of(number: int) -> list[Any] | None:
    try:
        return termios.tcgetattr(number)
    except termios.error:  # the terminal is closed
        return None


def _is_terminal(stream: object) -> bool:
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):  # there is no standard output, or it is closed
        return False


def _has_member(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
