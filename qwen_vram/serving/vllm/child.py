"""The process of vLLM, in a group of its own: start, output and end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Thread

import qwen_vram as qv

# Source: include/uapi/linux/prctl.h.
_PR_SET_PDEATHSIG = 1
# Lines of the log that an error repeats.
_LAST_LINES = 15
# Seconds between SIGTERM and SIGKILL for a group whose parent was killed.
_ORPHAN_SECONDS = 10.0
_PAUSE = 0.05


class VllmEndedError(qv.QwenVramError):
    """vLLM ended by itself. `returncode` is its exit status, negative for a signal, and `log` the end of its output."""

    def __init__(self, message: str, *, returncode: int, log: str) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.log = log


class Child:
    """A running vLLM. If this process is killed, the group is stopped too.

    Args:
        command: The command; its first word is the program.
        environment: Variables beside those of this process.
        line: Takes each line of its output, in a thread.

    Raises:
        BackendUnavailableError: the program cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], line: Callable[[str], None]) -> None:
        self._line = line
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        parent = os.getpid()

        def with_this_process() -> None:
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:  # it was killed before the call
                    os._exit(1)

        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**_outside(os.environ), **environment},
                start_new_session=True,
                preexec_fn=with_this_process,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise qv.BackendUnavailableError(
                f"cannot start vLLM: {command[0]!r}: {error.strerror}; pass --vllm the program `vllm` or its "
                "environment's folder, or make one: qwen-vram serve --setup-vllm FOLDER",
                backend="vllm",
                install="qwen-vram serve --setup-vllm FOLDER",
            ) from error
        self._watcher, self._to_watcher = _watched(self._process.pid)
        self._reader = Thread(target=self._read, name="vllm-log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The number of the process, and of its group."""
        return self._process.pid

    def returncode(self) -> int | None:
        """Return the exit status; `None` while it runs."""
        return self._process.poll()

    def ended(self) -> VllmEndedError:
        """Return the error of a process that ended by itself."""
        self._reader.join(1)
        log = "\n".join(self._last)
        code = self._process.returncode
        status = f"signal {-code}" if code < 0 else f"status {code}"
        return VllmEndedError(f"vLLM ended with {status}; the end of its log:\n{log}", returncode=code, log=log)

    def stop(self, seconds: float) -> None:
        """End the whole group: by SIGTERM, and after `seconds` by SIGKILL."""
        _end_group(self.pid, seconds, self._process.poll)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._reader.join(2)
        with suppress(OSError):
            os.write(self._to_watcher, b".")
        with suppress(OSError):
            os.close(self._to_watcher)
        with suppress(ChildProcessError):
            os.waitpid(self._watcher, 0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                text = line.rstrip()
                if text:
                    self._last.append(text)
                    self._line(text)


def _outside(variables: Mapping[str, str]) -> dict[str, str]:
    """Return variables without those that would show vLLM's Python the packages of this one."""
    return {name: value for name, value in variables.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _end_group(group: int, seconds: float, reap: Callable[[], object] = lambda: None) -> None:
    """Send SIGTERM to a group, and SIGKILL if it is still there after `seconds`."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
    end = time.monotonic() + seconds
    while time.monotonic() < end and _is_there(group):
        reap()
        time.sleep(_PAUSE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _watched(group: int) -> tuple[int, int]:
    """Start a process that ends `group` if this process ends without a word; return its number and the pipe to it.

    The parent's death signal is sent to vLLM's first process alone, and not to the processes that it started.
    """
    reading, writing = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            os.setsid()
            # Another descriptor that stays open keeps the server's address in use.
            os.closerange(3, reading)
            os.closerange(reading + 1, os.sysconf("SC_OPEN_MAX"))
            if os.read(reading, 1) == b"":
                _end_group(group, _ORPHAN_SECONDS)
        finally:
            os._exit(0)
    os.close(reading)
    return watcher, writing
