"""`qwen-vram run` under a terminal: Ctrl-C, Ctrl-Z, `fg`, `bg`, and programs that read the terminal.

Programs in these tests start no process: one that stops between `vfork` and `exec` holds its parent, also without
`run`, and a shell then waits for both.
"""

import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="job control needs bash")

RUN = f"{sys.executable} -m qwen_vram run --quiet --"
READS = "sh -c 'echo rea''dy; read x; echo got $x'"
PROMPT = "%% "


class Typist:
    """The other end of a terminal. Nothing here waits for more than ten seconds."""

    def __init__(self, *command):
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "PS1": PROMPT},
        )
        os.close(slave)
        self.shown, self.read = "", 0

    def sees(self, text):
        end = time.monotonic() + 10
        while text not in self.shown[self.read :]:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"the terminal never showed {text!r}, but {self.shown!r}"
            try:
                self.shown += os.read(self.master, 2**16).decode()
            except OSError:  # the other end is closed
                raise AssertionError(f"the session ended without {text!r}: {self.shown!r}") from None
        self.read = self.shown.index(text, self.read) + len(text)

    def types(self, text):
        os.write(self.master, text.encode())

    def enters(self, line):
        self.types(line + "\n")
        self.sees("\n")  # the echo of the line


@contextmanager
def session(*command):
    """Whatever the session started ends with it."""
    typist = Typist(*command)
    try:
        yield typist
    finally:
        for pid in psutil.pids():
            with suppress(ProcessLookupError):
                if os.getsid(pid) == typist.process.pid:
                    os.kill(pid, signal.SIGKILL)
        typist.process.wait(10)
        os.close(typist.master)


@contextmanager
def shell():
    with session("bash", "--norc", "--noprofile", "--noediting", "-i") as typist:
        typist.sees(PROMPT)
        yield typist


def test_ctrl_c_ends_the_program_alone():
    with shell() as typist:
        typist.enters(f"{RUN} {READS}")
        typist.sees("ready")
        typist.types("\x03")
        typist.sees(PROMPT)
        typist.enters("echo status $?")
        typist.sees("status 130")


def test_a_stopped_program_goes_on_and_reads_the_terminal():
    """In the background it leaves the terminal to the shell, and stops if it reads."""
    with shell() as typist:
        typist.enters(f"{RUN} {READS}")
        typist.sees("ready")
        typist.types("\x1a")
        typist.sees("Stopped")
        typist.enters("echo the shell re''ads")
        typist.sees("the shell reads")
        typist.enters("bg; wait -n; echo sta''te; jobs")
        typist.sees("state")
        typist.sees("Stopped")
        typist.enters("fg")
        typist.sees(RUN)
        typist.enters("word")
        typist.sees("got word")
        typist.sees(PROMPT)


@pytest.mark.parametrize("of", ["pipeline", "script"])
def test_all_of_a_pipeline_and_a_script_stop(of, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(f"{RUN} {READS}\necho after\n")
    with shell() as typist:
        typist.enters(f"{RUN} {READS} | cat" if of == "pipeline" else f"sh {script}")
        typist.sees("ready")
        typist.types("\x1a")
        typist.sees("Stopped")
        typist.enters("fg")
        typist.enters("word")
        typist.sees("got word")
        typist.sees("after" if of == "script" else PROMPT)


def test_a_program_behind_a_pipe_and_a_pager_after_it_read_the_terminal():
    with shell() as typist:
        typist.enters(f"echo piped | {RUN} sh -c 'read y; read x </dev/tty; echo $y $x'")
        typist.enters("word")
        typist.sees("piped word")
        typist.sees(PROMPT)
        typist.enters(f"{RUN} echo shown | sh -c 'cat; read x </dev/tty; echo pager $x'")
        typist.sees("shown")
        typist.enters("word")
        typist.sees("pager word")


def test_ctrl_z_without_a_shell_does_not_stop_the_program_for_ever():
    """The runner leads its session, as in a container: nothing could continue it."""
    with session(*RUN.split(), "sh", "-c", "echo ready; read x; echo got $x") as typist:
        typist.sees("ready")
        typist.types("\x1a")
        time.sleep(0.1)
        typist.enters("word")
        typist.sees("got word")
        assert typist.process.wait(10) == 0


def test_a_killed_program_leaves_the_terminal_with_echo():
    code = "import os, termios\nmode = termios.tcgetattr(0)\nmode[3] &= ~termios.ECHO\n"
    code += "termios.tcsetattr(0, termios.TCSANOW, mode)\nos.kill(os.getpid(), 9)"
    with session(*RUN.split(), sys.executable, "-c", code) as typist:
        before = termios.tcgetattr(typist.master)[3]
        assert typist.process.wait(10) == 128 + signal.SIGKILL
        assert before & termios.ECHO
        assert termios.tcgetattr(typist.master)[3] == before
