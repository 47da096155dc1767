"""Python code in a process of its own, forked from one that has imported torch and transformers."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

from tests.helpers.command import PRELOADED


class Forked:
    """A process that runs `code` with `sys.argv[1:]` of `arguments`, as `python -c` does, without its imports' seconds.

    It starts at once. Signals have their default handlers in it, and its output is kept in files.
    """

    def __init__(self, code: str, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = TemporaryDirectory(prefix="qwen_vram_forked_")
        self._words = [str(one) for one in arguments]
        work = (code, self._words, self._folder.name, os.getcwd(), dict(os.environ if env is None else env))
        self._process = context.Process(target=_main, args=work, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def said(self, name: str = "out") -> str:
        """Return the text that it has written to `out` or `err` by now."""
        path = Path(self._folder.name) / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self, timeout: float = 300) -> CompletedProcess[str]:
        """Wait for its end; kill it after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutExpired(self._words, timeout)
        ended = CompletedProcess(self._words, self._process.exitcode, self.said("out"), self.said("err"))
        self._folder.cleanup()
        return ended


def python(code: str, *arguments: object, env: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """`python -c CODE ARGUMENTS`, run to its end."""
    return Forked(code, *arguments, env=env).wait()


def _main(code: str, words: list[str], folder: str, directory: str, environment: dict[str, str]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        opened = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = ["-c", *words]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
