"""The process that runs vLLM, with small programs in its place: groups of processes, ends and errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

import qwen_vram as qv
from qwen_vram.serving.vllm.child import Child, VllmEndedError

# A program that starts another one, as vLLM does, and writes both numbers.
PARENT = """
import subprocess, sys, time
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print("below", below.pid, flush=True)
time.sleep(100)
"""
# The same, deaf to SIGTERM.
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PARENT


def start(code: str, lines: list[str]) -> Child:
    return Child([sys.executable, "-c", code], {"VLLM_X": "1"}, lines.append)


def until(question, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < end
        time.sleep(0.02)


def number_below(lines: list[str]) -> int:
    until(lambda: any(line.startswith("below") for line in lines))
    return int(next(line for line in lines if line.startswith("below")).split()[1])


def gone(number: int) -> bool:
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("code", "seconds"), [(PARENT, 20.0), (DEAF, 0.3)])
def test_the_end_is_that_of_the_whole_group(code, seconds):
    lines: list[str] = []
    child = start(code, lines)
    below = number_below(lines)
    began = time.monotonic()
    child.stop(seconds)
    assert time.monotonic() - began < 8
    assert child.returncode() is not None
    until(lambda: gone(below), 3)


def test_lines_and_variables_of_a_program_that_ends(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/packages")
    lines: list[str] = []
    child = start(
        "import os, sys; print('a', os.environ['VLLM_X'], '/packages' in sys.path); sys.stderr.write('b'); sys.exit(3)",
        lines,
    )
    until(lambda: child.returncode() is not None)
    error = child.ended()
    assert isinstance(error, VllmEndedError)
    assert error.returncode == 3
    assert sorted(error.log.splitlines()) == ["a 1 False", "b"] == sorted(lines)
    assert str(error).startswith("vLLM ended with status 3; the end of its log:\n")
    child.stop(1)


def test_a_program_that_is_missing_is_one_error(tmp_path):
    missing = str(tmp_path / "vllm")
    with pytest.raises(qv.BackendUnavailableError, match="cannot start vLLM: .*No such file.*--setup-vllm FOLDER"):
        Child([missing], {}, print)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
@pytest.mark.parametrize("program", [PARENT, pytest.param(DEAF, marks=pytest.mark.full)])
def test_a_killed_parent_takes_the_group_with_it(program):
    code = textwrap.dedent(
        f"""
        import sys, time
        from qwen_vram.serving.vllm.child import Child
        child = Child([sys.executable, "-c", {program!r}], {{}}, lambda line: print(line, child_pid(), flush=True))
        def child_pid():
            return child.pid
        time.sleep(100)
        """
    )
    root = str(Path(qv.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    ) as parent:
        assert parent.stdout is not None
        _, below, first = parent.stdout.readline().split()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        # If a program is deaf to SIGTERM, the watcher waits 10 s, and then kills the group.
        until(lambda: gone(int(below)) and gone(int(first)), 20)
