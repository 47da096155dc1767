"""Access log: a line for each request, without prompts, keys or what else a client chose."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Collection
from datetime import datetime

from qwen_vram.serving.web.asgi import App, Message, Receive, Scope, Send, refuse
from qwen_vram.serving.wire.problem import ApiError

# Methods of requests to this server; others are not written as they came.
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")


def write_line(text: str) -> None:
    """Write a line to standard error, with the local time."""
    print(f"{datetime.now().astimezone().isoformat(timespec='milliseconds')} {text}", file=sys.stderr, flush=True)


class AccessLog:
    """The outermost part of the server: it logs each request, and answers 500 to unexpected errors.

    Args:
        paths: Paths that are written as they are; another one is written as `(other path)`.
        write: Takes a line.
        count: Takes path, status and seconds of a request.
    """

    def __init__(
        self,
        app: App,
        paths: Collection[str],
        write: Callable[[str], None],
        count: Callable[[str, int, float], None],
    ) -> None:
        self._app, self._paths, self._write, self._count = app, frozenset(paths), write, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._write(f"error {type(error).__name__} at {place.filename}:{place.lineno} {place.name}")
            if not status:
                await refuse(note, ApiError(500, "the server failed; its log names the error", code="internal_error"))
        finally:
            seconds = time.monotonic() - began
            path = scope["path"] if scope["path"] in self._paths else "(other path)"
            method = scope["method"] if scope["method"] in _METHODS else "(other method)"
            client = (scope.get("client") or ("-",))[0]
            # 499 is nginx's number for a client that closed the connection before an answer.
            self._count(path, status or 499, seconds)
            self._write(f"{client} {method} {path} {status or 499} {1000 * seconds:.0f} ms")
