"""A case in a fresh process, with a time limit."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

_WORKER = "qwen_vram.benchmark.worker"
_PATIENCE_SECONDS = 30.0
_TAIL = 300


def run_case(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the fields that the process measured, or its error under `error`.

    The process is killed after `seconds`, and if this call is interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="qwen_vram_benchmark_") as work, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd=work,  # Python would also import modules of the caller's folder
            env={**os.environ, "PYTHONPATH": _python_path()},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
            line = _line(process.stdout, seconds)
            if line is None:
                return {"error": f"it did not end within {seconds:g} s; allow more with --timeout, or run it smaller"}
            if line.endswith(b"\n"):
                found: dict[str, Any] = json.loads(line)
                return found
            status = process.wait(_PATIENCE_SECONDS)
            return {"error": f"its process ended with exit status {status}{_hint(status)}{_last_words(log)}"}
        except BrokenPipeError:
            status = process.wait(_PATIENCE_SECONDS)
            return {"error": f"its process ended with exit status {status}{_hint(status)}{_last_words(log)}"}
        finally:
            _end(process)


def _line(stream: IO[bytes], seconds: float) -> bytes | None:
    """Return what the process wrote, up to the end of a line or of the stream; `None` after `seconds`."""
    end, text = time.monotonic() + seconds, b""
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        piece = os.read(stream.fileno(), 2**16)
        if not piece:
            break
        text += piece
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a process end that has answered, and kill any other. Its memory is free afterwards."""
    try:
        if process.poll() is None:
            process.kill()
    finally:
        process.communicate()


def _hint(status: int) -> str:
    return " (killed, perhaps because the host's memory is full)" if status == -9 else ""


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:_TAIL]}" if lines else ""


def _python_path() -> str:
    """This package's folder first, so that the process runs this version."""
    package = str(Path(__file__).parents[2])
    others = [str(Path(one).resolve()) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    return os.pathsep.join(dict.fromkeys([package, *others]))
