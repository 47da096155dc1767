"""Types of ASGI, and answers of JSON in it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from qwen_vram.serving.wire.problem import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header of a request with a name in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def answer(
    send: Send,
    status: int,
    content: bytes,
    kind: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a complete answer."""
    named = {"content-type": kind, "content-length": str(len(content)), "cache-control": "no-store", **(headers or {})}
    pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


async def answer_json(send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    """Send a JSON value."""
    await answer(send, status, json.dumps(value).encode(), headers=headers)


async def refuse(send: Send, error: ApiError) -> None:
    """Send an error."""
    await answer_json(send, error.status, error.body(), error.headers)
