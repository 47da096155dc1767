"""Answering of a request: its events as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from qwen_vram.serving.engine.interface import Engine, Prepared
from qwen_vram.serving.engine.work_queue import Handle
from qwen_vram.serving.web.asgi import Receive, Scope, Send, answer_json, refuse
from qwen_vram.serving.wire.body import parsed_object
from qwen_vram.serving.wire.events import Began, Done, Ended, Event, Failed, Gone, Piece
from qwen_vram.serving.wire.problem import ApiError
from qwen_vram.serving.wire.replies import Replies, usage
from qwen_vram.serving.wire.requests import Wanted

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
]


class _Silence(NamedTuple):
    """A time without an event; `before` is the number of requests before a waiting one."""

    before: int | None

    def comment(self) -> bytes:
        """Return a line that clients of server-sent events ignore."""
        return b": keep-alive\n\n" if self.before is None else b": keep-alive, %d waiting before\n\n" % self.before


class Endpoint:
    """An endpoint that generates, as an ASGI application.

    Args:
        read: Returns the checked request of a body.
        model: The name of the served model.
        heartbeat: Seconds of silence after which a stream gets a comment.
        max_wait: The most seconds in the queue.
    """

    def __init__(
        self,
        engine: Engine,
        read: Callable[[dict[str, Any]], Wanted],
        *,
        model: str,
        heartbeat: float,
        max_wait: float,
        checks: Checks,
    ) -> None:
        self._engine, self._read, self._model, self._checks = engine, read, model, checks
        self._heartbeat, self._max_wait = heartbeat, max_wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body is in one message."""
        body = (await receive()).get("body", b"")
        mailbox: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(mailbox.put_nowait, event)

        try:
            wanted, prepared = await self._checks.run(lambda: self._checked(body))
            handle = self._engine.submit(prepared, deliver)
        except ApiError as error:
            await refuse(send, error)
            return
        watcher = asyncio.create_task(_watch(receive, deliver))
        try:
            replies = Replies(
                self._model, chat=wanted.chat, answers=len(prepared.answers), logprobs=wanted.logprobs is not None
            )
            events = self._events(mailbox, handle)
            answer = self._stream if wanted.stream else self._whole
            await answer(send, events, replies, wanted, prepared.prompt_tokens)
        finally:
            handle.cancel()  # without effect on a request that is over
            watcher.cancel()

    def _checked(self, body: bytes) -> tuple[Wanted, Prepared]:
        """Return a request and its work, in a thread of checks."""
        wanted = self._read(parsed_object(body))
        if wanted.model not in (None, self._model):
            raise unknown_model(str(wanted.model), self._model)
        return wanted, self._engine.prepare(wanted)

    async def _events(self, mailbox: asyncio.Queue[Event], handle: Handle) -> AsyncIterator[Event | _Silence]:
        """Yield the events of a request up to its end, and a silence after each heartbeat without one."""
        until = time.monotonic() + self._max_wait
        while True:
            left = self._heartbeat if handle.begun else min(self._heartbeat, max(0.01, until - time.monotonic()))
            try:
                event = await asyncio.wait_for(mailbox.get(), left)
            except asyncio.TimeoutError:
                if handle.begun or time.monotonic() < until:
                    yield _Silence(None if handle.begun else handle.position)
                    continue
                handle.cancel()
                event = Failed(self._waited_too_long())
            yield event
            if isinstance(event, (Done, Failed, Gone)):
                return

    def _waited_too_long(self) -> ApiError:
        return ApiError(
            503,
            f"the request waited {self._max_wait:g} s, the most here; try again later",
            code="waited_too_long",
            headers={"Retry-After": str(self._engine.queue.retry_after())},
        )

    async def _whole(
        self, send: Send, events: AsyncIterator[Event | _Silence], replies: Replies, wanted: Wanted, prompt_tokens: int
    ) -> None:
        """Answer with one object. Nothing can be sent before its status, so there is no heartbeat."""
        pieces: list[Piece] = []
        ends: list[Ended] = []
        async for event in events:
            if isinstance(event, Piece):
                pieces.append(event)
            elif isinstance(event, Ended):
                ends.append(event)
            elif isinstance(event, Failed):
                await refuse(send, event.error)
            elif isinstance(event, Done):
                await answer_json(send, 200, replies.whole(pieces, ends, prompt_tokens))

    async def _stream(
        self, send: Send, events: AsyncIterator[Event | _Silence], replies: Replies, wanted: Wanted, prompt_tokens: int
    ) -> None:
        """Answer with server-sent events, and with comments in silence."""
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        generated = 0
        async for event in events:
            if isinstance(event, _Silence):
                await _part(send, event.comment())
            elif isinstance(event, Began):
                await _part(send, b": running\n\n")
            elif isinstance(event, (Piece, Ended)):
                generated += event.tokens if isinstance(event, Ended) else 0
                for chunk in replies.chunks(event, with_usage=wanted.include_usage):
                    await _part(send, _data(chunk))
            elif isinstance(event, Failed):
                await _part(send, _data(event.error.body()))
            elif isinstance(event, Done):
                if wanted.include_usage:
                    await _part(send, _data(replies.usage_chunk(usage(prompt_tokens, generated))))
                await _part(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Checks:
    """Checks of requests in one thread, so that a large one does not block streams of others.

    Args:
        most: Returns the most requests that wait for their check.
        full: Returns the error of a further one.
    """

    def __init__(self, most: Callable[[], int], full: Callable[[], ApiError]) -> None:
        self._most, self._full = most, full
        self._count = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qwen-vram checks")

    async def run(self, check: Callable[[], tuple[Wanted, Prepared]]) -> tuple[Wanted, Prepared]:
        """Return the result of a check.

        Raises:
            ApiError: its error, or too many requests wait.
        """
        if self._count >= self._most():
            raise self._full()
        self._count += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, check)
        finally:
            self._count -= 1


def unknown_model(name: str, served: str) -> ApiError:
    """Return the error for another model than the served one."""
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    return ApiError(
        404,
        f"the model {shown!r} is not served here; this server has {served!r}",
        param="model",
        code="model_not_found",
    )


async def _watch(receive: Receive, deliver: Callable[[Event], None]) -> None:
    """Deliver the end of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    deliver(Gone())


async def _part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _data(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
