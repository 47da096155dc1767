"""Programs that loop, fork, take memory, write outside their folder or open a socket are stopped, and leave nothing."""

import os
import socket
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from qwen_vram.quality.answers.sandbox import run_program

pytestmark = pytest.mark.no_torch


def test_a_function_gets_its_arguments_and_returns_its_values():
    ran = run_program("def f(a, b):\n    return {'sum': a + b}", "f", [[1, 2], [3, 4]])
    assert ran == ([{"sum": 3}, {"sum": 7}], None)


HOME = Path.home() / "qwen_vram_sandbox_probe"
TEMP = Path(tempfile.gettempdir()) / "qwen_vram_sandbox_probe"
BAD = {
    "loop": ("def f(n):\n    while True:\n        pass", "did not end in 1.5 seconds"),
    "sleep": ("import time\ndef f(n):\n    time.sleep(100)", "did not end in 1.5 seconds"),
    "fork": ("import os\ndef f(n):\n    while True:\n        os.fork()", "os.fork is refused"),
    "process": ("import subprocess\ndef f(n):\n    subprocess.run(['true'])", "is refused"),
    "system": ("import os\ndef f(n):\n    return os.system('true')", "os.system is refused"),
    "memory": ("def f(n):\n    return len(bytearray(10 * 2**30))", "MemoryError"),
    "home": (f"def f(n):\n    open({str(HOME)!r}, 'w').write('x')", "is refused"),
    "temporary folder": (f"def f(n):\n    open({str(TEMP)!r}, 'w').write('x')", "is refused"),
    "os.open": (f"import os\ndef f(n):\n    os.open({str(HOME)!r}, os.O_CREAT | os.O_WRONLY)", "is refused"),
    "remove": (f"import os\ndef f(n):\n    os.remove({__file__!r})", "os.remove is refused"),
    "ctypes": ("import ctypes\ndef f(n):\n    return 1", "import ctypes is refused"),
    "exit": ("import os\nos._exit(0)", "without values"),
    "SystemExit": ("raise SystemExit(0)", "SystemExit"),
    "no function": ("x = 1", "KeyError"),
    "syntax": ("def f(n) return n", "SyntaxError"),
    "recursion": ("def f(n):\n    return f(n)", "RecursionError"),
    "not plain data": ("def f(n):\n    return {1, 2}", "TypeError"),
}


@pytest.mark.parametrize(("code", "error"), BAD.values(), ids=BAD)
def test_a_bad_program_is_stopped_and_leaves_nothing(code, error):
    before = set(psutil.pids())
    folders = set(Path(tempfile.gettempdir()).glob("qwen_vram_answer_*"))
    began = time.monotonic()
    ran = run_program(code, "f", [[1]], seconds=1.5)
    assert ran.values is None
    assert error in ran.error
    assert time.monotonic() - began < 6
    assert not HOME.exists()
    assert not TEMP.exists()
    own = [pid for pid in set(psutil.pids()) - before if _runs_the_sandbox(pid)]
    assert not own
    assert set(Path(tempfile.gettempdir()).glob("qwen_vram_answer_*")) <= folders


def test_a_program_has_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\ndef f(n):\n    socket.create_connection(('127.0.0.1', {port})).close()\n    return 1"
        ran = run_program(code, "f", [[1]])
        assert ran.values is None
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_program_may_write_into_its_folder_and_its_home_is_that_folder():
    code = "import os\ndef f(n):\n    open(os.path.expanduser('~/x'), 'w').write('yes')\n    return open('x').read()"
    assert run_program(code, "f", [[1]]).values == ["yes"]


def test_a_secret_of_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ran = run_program("import os\ndef f(n):\n    return os.environ.get('HF_TOKEN')", "f", [[1]])
    assert ran.values == [None]


def _runs_the_sandbox(pid: int) -> bool:
    try:
        return os.getpid() in [one.pid for one in psutil.Process(pid).parents()] and "sandbox_child" in " ".join(
            psutil.Process(pid).cmdline()
        )
    except psutil.Error:
        return False
