"""A server of the command line in a process of its own, forked from one that has imported torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.helpers.command import PRELOADED, _code, _command_line, _main


class Server:
    """A process that runs `qwen-vram serve ARGUMENTS --port 0`, or code that serves.

    Attributes:
        url: Its address, such as `http://127.0.0.1:40123`.
    """

    def __init__(self, *arguments: object, code: str = "", environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = TemporaryDirectory(prefix="qwen_vram_server_")
        (Path(self._folder.name) / "in").touch()
        words = [code] if code else ["serve", *map(str, arguments), "--port", "0"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        given = (_code if code else _command_line, words, self._folder.name, os.getcwd(), variables)
        self.process = context.Process(target=_main, args=given, daemon=True)
        self.process.start()
        self.url = ""

    def __enter__(self) -> Server:
        found = self.wait_for(lambda: re.search(r"listening on (\S+)", self.out))
        self.url = found[1]
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._folder.cleanup()

    @property
    def out(self) -> str:
        """Return its standard output so far."""
        return self._text("out")

    @property
    def err(self) -> str:
        """Return its standard error so far."""
        return self._text("err")

    def _text(self, name: str) -> str:
        path = Path(self._folder.name) / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, question: Any, seconds: float = 120) -> Any:
        """The first answer that is true; the test fails if the process ends before."""
        end = time.monotonic() + seconds
        while not (found := question()):
            assert self.process.is_alive(), self.out + self.err
            assert time.monotonic() < end, self.out + self.err
            time.sleep(0.02)
        return found

    def ready(self) -> Server:
        """Wait until the model is loaded."""
        self.wait_for(lambda: self.get("/health")[0] == 200)
        return self

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and text of a path."""
        return self._ask(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, value: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a request with a JSON value."""
        named = {"Content-Type": "application/json", **{key.replace("_", "-"): text for key, text in headers.items()}}
        status, text = self._ask(urllib.request.Request(self.url + path, json.dumps(value).encode(), named))
        return status, json.loads(text)

    def _ask(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
