"""`qwen-vram run`: exit status, signals, and nothing that stays behind."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

import qwen_vram as qv

PREFIX = [sys.executable, "-m", "qwen_vram", "run", "--every", "100ms"]


def run(*command, options=(), **how):
    return subprocess.run([*PREFIX, *options, "--", *command], capture_output=True, text=True, timeout=60, **how)


@contextmanager
def started(*command):
    """The runner and the number that the program prints: its own, or its child's."""
    with subprocess.Popen([*PREFIX, "--", *command], stdout=subprocess.PIPE, text=True) as runner:
        yield runner, int(runner.stdout.readline())


def gone(pid):
    """Tell if a process ends within ten seconds."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_output_and_status_are_the_programs(tmp_path):
    ended = run("sh", "-c", "echo out; echo err >&2; cat; exit 7", options=["--log", str(tmp_path / "log")], input="in")
    assert ended.returncode == 7
    assert ended.stdout == "out\nin"
    assert ended.stderr.startswith("err\nqwen-vram: at most ")
    assert len(qv.read_log(tmp_path / "log")) >= 2
    assert run("true", options=["--quiet"]).stderr == ""


def test_options_behind_the_program_are_its_own():
    assert run("echo", "--every", "--log", "-x").stdout == "--every --log -x\n"


def test_a_signal_that_ends_the_program_is_told_as_a_shell_does():
    assert run("sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [
        ("no-such-program", 127, "cannot run 'no-such-program': No such file or directory"),
        ("/etc", 126, "cannot run '/etc'"),
    ],
)
def test_a_program_that_cannot_run(command, status, text):
    ended = run(command)
    assert ended.returncode == status
    assert text in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_program_which_decides(number):
    code = f"""
import os, signal, time
signal.signal({int(number)}, lambda *_: exit(5))
print(os.getpid(), flush=True)
time.sleep(60)
"""
    with started(sys.executable, "-c", code) as (runner, pid):
        runner.send_signal(number)
        assert runner.wait(30) == 5
        assert gone(pid)


CHILDREN = "sleep 60 & echo $!; wait"


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.full)])
def test_a_killed_runner_leaves_no_process(times):
    rng = random.Random(3)
    for _ in range(times):
        with started("sh", "-c", CHILDREN) as (runner, grandchild):
            group = os.getpgid(grandchild)
            time.sleep(0.1 * rng.random())
            runner.kill()
            runner.wait()
            assert gone(grandchild)
            assert gone(group)


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.full)])
def test_a_killed_program_ends_the_runner(times):
    rng = random.Random(4)
    for _ in range(times):
        with started("sh", "-c", "echo $$; exec sleep 60") as (runner, pid):
            time.sleep(0.1 * rng.random())
            os.kill(pid, signal.SIGKILL)
            assert runner.wait(30) == 128 + signal.SIGKILL


def test_a_log_that_cannot_be_written_ends_the_program_first(tmp_path):
    ended = run("sh", "-c", f"sleep 5; touch {tmp_path / 'made'}", options=["--log", str(tmp_path / "no" / "log")])
    assert ended.returncode == 2
    assert "cannot write the log" in ended.stderr
    time.sleep(0.2)
    assert not (tmp_path / "made").exists()
