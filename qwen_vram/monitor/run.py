"""`qwen-vram run`: a program that is watched while it runs.

The program gets a process group of its own, and the terminal, as a shell does it. Signals to this process are passed
on to the group. If the program stops (Ctrl-Z), this process stops its own group, so that the shell sees a stopped job;
`fg` and `bg` continue both. A second process waits for the end of this one: if this one is killed, it kills the group,
so that nothing stays behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from qwen_vram.errors import QwenVramError
from qwen_vram.monitor.monitor import Monitor
from qwen_vram.monitor.terminal import Terminal

_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP", "SIGCONT", "SIGUSR1", "SIGUSR2", "SIGWINCH")
_PAUSE = 0.2


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
    with Terminal.opened() as terminal:
        process = _start(command, terminal)
        try:
            signals = _Signals(process.pid, terminal)
            with _watchdog(process.pid), signals.passed_on():
                try:
                    monitor.start()
                except BaseException:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise
                try:
                    status = _wait(process, terminal, signals)
                finally:
                    monitor.stop()
        finally:
            terminal.take_back(process.pid)
        if os.WIFSIGNALED(status):  # a program that is killed leaves the terminal without echo, for example
            terminal.restore_modes()
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _start(command: Sequence[str], terminal: Terminal) -> subprocess.Popen[bytes]:
    def in_the_child() -> None:
        lent = terminal.can_lend()
        os.setpgid(0, 0)
        if lent:
            terminal.give(os.getpid())
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


def _wait(process: subprocess.Popen[bytes], terminal: Terminal, signals: _Signals) -> int:
    """Wait for the end of a program, and return its status; stop with it (Ctrl-Z), and continue with it."""
    group = process.pid
    while True:
        _, status = os.waitpid(group, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
            return status
        if not terminal.exists:
            continue  # without job control, the one who stopped it continues it
        needs_terminal = os.WSTOPSIG(status) in (signal.SIGTTIN, signal.SIGTTOU)
        if not needs_terminal or not terminal.is_held_by(os.getpgrp(), group):
            terminal.take_back(group)
            signals.stop = False
            _stop_this_job()
            if needs_terminal:
                time.sleep(_PAUSE)  # if no shell can stop this job, the program asks again and again
        if terminal.can_lend() or (needs_terminal and terminal.is_held_by(os.getpgrp())):
            terminal.give(group)
        signals.send(signal.SIGCONT)
        if signals.stop:  # the one before has deleted it
            signals.stop = False
            signals.send(signal.SIGTSTP)


def _stop_this_job() -> None:
    """Stop this process's group until the shell continues it.

    The group contains the rest of a pipeline, and a script that runs this process. The system ignores the signal if no
    shell could continue the group.
    """
    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.killpg(os.getpgrp(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, before)


class _Signals:
    """Signals to this process, passed on to a program's group.

    Attributes:
        stop: A stop was passed on, and the program has not stopped since.
    """

    def __init__(self, group: int, terminal: Terminal) -> None:
        self.stop = False
        self._group, self._terminal = group, terminal

    def send(self, number: int) -> None:
        """Send a signal to the group, if it has not ended."""
        with suppress(ProcessLookupError):
            os.killpg(self._group, number)

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Pass signals on until the end."""
        numbers = [signal.Signals[name] for name in _PASSED_ON]
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTSTP:
            self.stop = True
        if number == signal.SIGCONT and self._terminal.can_lend():
            self._terminal.give(self._group)
        self.send(number)


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
