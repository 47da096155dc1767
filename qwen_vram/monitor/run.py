"""`qwen-vram run`: a program that is watched while it runs.

The program gets a process group of its own, and the terminal, as a shell does it. Signals to this process are passed
on to the group. A second process waits for the end of this one: if this one is killed, it kills the group, so that
nothing stays behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from qwen_vram.errors import QwenVramError
from qwen_vram.monitor.monitor import Monitor

_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")


class CommandError(QwenVramError):
    """A program cannot be started. `status` is the exit status that a shell gives: 126 or 127."""

    def __init__(self, message: str, *, command: str, status: int) -> None:
        super().__init__(message)
        self.command, self.status = command, status


def run(command: Sequence[str], monitor: Monitor) -> int:
    """Run a program under `monitor`, and return its exit status; 128 and its number if a signal ended it.

    Raises:
        CommandError: there is no such program, or it cannot be executed.
        LogError: the monitor's log cannot be written; the program is not started, or ends first.
    """
    terminal = _terminal()
    with _kept_terminal(terminal):
        process = _start(command, terminal)
        with _watchdog(process.pid), _signals_to(process.pid):
            try:
                monitor.start()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            try:
                status = _wait(process, terminal)
            finally:
                monitor.stop()
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _start(command: Sequence[str], terminal: int | None) -> subprocess.Popen[bytes]:
    def in_the_child() -> None:
        os.setpgid(0, 0)
        if terminal is not None:
            os.tcsetpgrp(terminal, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)

    try:
        process = subprocess.Popen(list(command), preexec_fn=in_the_child)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise CommandError(
            f"cannot run {command[0]!r}: {error.strerror}; name a program that exists, and put `--` before it",
            command=command[0],
            status=127 if missing else 126,
        ) from error
    with suppress(OSError):
        os.setpgid(process.pid, process.pid)  # whichever of the two is first
    return process


def _wait(process: subprocess.Popen[bytes], terminal: int | None) -> int:
    """Wait for the end of a program, and return its status; stop with it (Ctrl-Z), and go on with it."""
    while True:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
            return status
        if terminal is None:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.tcsetpgrp(terminal, os.getpgrp())
            os.kill(os.getpid(), signal.SIGSTOP)
            os.tcsetpgrp(terminal, process.pid)
        os.killpg(process.pid, signal.SIGCONT)


def _terminal() -> int | None:
    """The descriptor of the terminal, if this process is in its foreground."""
    try:
        number = sys.stdin.fileno()
        return number if os.tcgetpgrp(number) == os.getpgrp() else None
    except (OSError, ValueError, AttributeError):
        return None


@contextmanager
def _kept_terminal(terminal: int | None) -> Iterator[None]:
    """Take the terminal back at the end. Without the signal, taking it would stop this process."""
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        yield
    finally:
        if terminal is not None:
            with suppress(OSError):
                os.tcsetpgrp(terminal, os.getpgrp())
        signal.signal(signal.SIGTTOU, before)


@contextmanager
def _signals_to(group: int) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(group, number)

    numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watchdog(group: int) -> Iterator[None]:
    """A process that kills `group` if this process ends without taking leave."""
    reading, writing = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            os.setsid()
            os.close(writing)
            if os.read(reading, 1) == b"":
                os.killpg(group, signal.SIGKILL)
        finally:
            os._exit(0)
    os.close(reading)
    try:
        yield
    finally:
        with suppress(OSError):  # the watcher was killed
            os.write(writing, b".")
        os.close(writing)
        with suppress(ChildProcessError):
            os.waitpid(watcher, 0)
