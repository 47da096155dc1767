"""The process of one program: its limits, and the values of the calls.

It is run by its path, without the package, and imports the standard library alone. Standard input is a JSON object with
`code`, `function` and `calls`. The values are written to `result.json` in the working folder.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

# Source: linux/sched.h and linux/prctl.h.
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

# Events that are refused, by their beginning: https://docs.python.org/3/library/audit_events.html
_REFUSED = (
    "socket.", "subprocess.", "ctypes.", "os.fork", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "pty.",
    "os.kill", "resource.setrlimit", "resource.prlimit", "shutil.", "os.chmod", "os.chown", "os.link", "os.symlink",
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.setxattr", "os.removexattr",
    "os.startfile", "os.chflags", "os.unshare", "os.setns", "ftplib.", "smtplib.", "urllib.", "http.", "webbrowser.",
)  # fmt: skip
# Modules that start processes or call into the kernel without an event of their own.
_MODULES = ("ctypes", "_ctypes", "_posixsubprocess", "_multiprocessing", "mmap")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the program on standard input."""
    task = json.load(sys.stdin)
    folder = os.path.realpath(os.getcwd())
    result = os.open("result.json", os.O_WRONLY | os.O_CREAT, 0o600)
    _isolate()
    for name, limit in task["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.addaudithook(_guard(folder))
    os.write(result, json.dumps(_values(task)).encode())
    os._exit(0)


def _values(task: dict[str, Any]) -> dict[str, Any]:
    try:
        names: dict[str, Any] = {"__name__": "__answer__"}
        exec(compile(task["code"], "<answer>", "exec"), names)
        values = [names[task["function"]](*call) for call in task["calls"]]
        return {"values": json.loads(json.dumps(values))}
    except BaseException as error:  # the program may raise SystemExit
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def _isolate() -> None:
    """Leave the network, if the kernel lets a user do that, and end with the parent."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    for name in [name for name in sys.modules if name.partition(".")[0] in _MODULES]:
        del sys.modules[name]


def _guard(folder: str) -> Any:
    """Return the hook that refuses what a function of numbers and texts does not need. It cannot be removed."""
    inside = folder + os.sep
    realpath, dirname, join = os.path.realpath, os.path.dirname, os.path.join

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import" and arguments[0] in _MODULES:
            raise PermissionError(f"import {arguments[0]} is refused")
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & _WRITING:
            path = os.fsdecode(arguments[0])
            real = join(realpath(dirname(path) or "."), os.path.basename(path))
            if not (real + os.sep).startswith(inside) or os.path.islink(real):
                raise PermissionError(f"writing {path} is refused")
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is refused")

    return hook


if __name__ == "__main__":
    main()
