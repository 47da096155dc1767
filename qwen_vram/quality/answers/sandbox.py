"""Running of a program that a model wrote, in a process with limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

_CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS = 10.0
"""The most seconds of a program, by the clock."""
MEMORY = 512 * 2**20
"""The most bytes of its address space. Measured: Python 3.11 takes 40 MB of it, 2026-12-01."""
_RESULT_BYTES = 1 << 20
LIMITS = {
    "RLIMIT_CPU": 5,
    "RLIMIT_AS": MEMORY,
    "RLIMIT_NPROC": 0,
    "RLIMIT_FSIZE": _RESULT_BYTES,
    "RLIMIT_NOFILE": 32,
    "RLIMIT_CORE": 0,
}


class Ran(NamedTuple):
    """The result of a program: the values of the calls, or the reason why there are no values."""

    values: list[Any] | None
    error: str | None = None


def run_program(code: str, function: str, calls: Sequence[Sequence[Any]], *, seconds: float = SECONDS) -> Ran:
    """Define the functions of `code` in a new process, and return the values of the calls of one of them.

    The process has limits of CPU time, memory, processes and file size. Its home is a temporary folder, outside of
    which it writes nothing. It has no network. It protects against programs that a model writes by mistake; it is no
    defence against a program that was written to break out.
    """
    with TemporaryDirectory(prefix="qwen_vram_answer_") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        task = {"code": code, "function": function, "calls": calls, "limits": LIMITS}
        try:
            process.communicate(json.dumps(task).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Ran(None, f"did not end in {seconds:g} seconds")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return _result(Path(folder) / "result.json", process.returncode)


def _result(path: Path, status: int) -> Ran:
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_RESULT_BYTES))
        return Ran(data.get("values"), data.get("error"))
    except (OSError, ValueError, AttributeError):
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return Ran(None, f"ended with {name}, without values")
