"""Requests that are passed through to vLLM, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qwen_vram.serving.vllm.state import State
from qwen_vram.serving.web.asgi import Receive, Scope, Send, answer_json, refuse
from qwen_vram.serving.wire.problem import ApiError

# Headers of an answer that go on to the client. The others are vLLM's own, or of its connection.
_KEPT = (b"content-type", b"content-length", b"cache-control", b"retry-after", b"x-request-id")
# Headers of a request that vLLM reads.
_SENT = (b"content-type", b"accept", b"x-request-id")
_PREFIX = "/v1/"
# Seconds until vLLM must accept a connection, and until it must answer a question about its health.
_CONNECT_SECONDS = 10.0
_HEALTH_SECONDS = 10.0


class Upstream:
    """The server of vLLM, on a port that only this machine can connect to.

    Args:
        url: Its address.
        key: The key that it asks for.
        state: Tells if it is ready.
    """

    def __init__(self, url: str, key: str, state: Callable[[], State]) -> None:
        import httpx2

        self._httpx = httpx2
        self._state = state
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,  # a proxy of the environment is not for this machine's own address
        )
        self.running = 0

    async def is_healthy(self) -> bool:
        """Tell if vLLM answers that it is healthy."""
        try:
            answer = await self._client.get("/health", timeout=_HEALTH_SECONDS)
        except self._httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def metrics(self) -> str:
        """Return vLLM's own metrics; empty if it does not answer."""
        try:
            answer = await self._client.get("/metrics", timeout=_HEALTH_SECONDS)
        except self._httpx.HTTPError:
            return ""
        return str(answer.text) if answer.status_code == 200 else ""

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back; stop it in vLLM if the client leaves."""
        state = self._state()
        if state.name != "ready":
            await refuse(send, not_ready(state))
            return
        request = await receive()  # with the whole body, from the gate before
        if request["type"] == "http.disconnect":
            return
        self.running += 1
        passing = asyncio.ensure_future(self._pass_on(scope, request.get("body", b""), send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                passing.cancel()
            with suppress(asyncio.CancelledError):
                await passing
        finally:
            leaving.cancel()
            passing.cancel()
            self.running -= 1

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> None:
        path = scope["raw_path"].partition(b"?")[0].decode("latin-1")
        if not path.startswith(_PREFIX) or ".." in path.split("/") or "%" in path:
            await refuse(send, ApiError(404, f"there is no such path; vLLM's begin with {_PREFIX}", code="not_found"))
            return
        query = scope["query_string"].decode("latin-1")
        headers = [(key, value) for key, value in scope["headers"] if key in _SENT]
        request = self._client.build_request(
            scope["method"], path + (f"?{query}" if query else ""), headers=headers, content=body or None
        )
        try:
            answer = await self._client.send(request, stream=True)
        except self._httpx.HTTPError as error:
            await refuse(send, _no_answer(self._state(), error))
            return
        try:
            await self._pass_back(answer, send)
        finally:
            await answer.aclose()

    async def _pass_back(self, answer: Any, send: Send) -> None:
        headers = [(key.lower(), value) for key, value in answer.headers.raw if key.lower() in _KEPT]
        streams = answer.headers.get("content-type", "").startswith("text/event-stream")
        if streams:
            headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        try:
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except self._httpx.HTTPError as error:
            if not streams:
                raise  # the status is sent: only the closed connection can say that the answer is not whole
            event = json.dumps(_no_answer(self._state(), error).body())
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def health(state: State, running: int, send: Send) -> None:
    """Answer with a state: 200 if it is ready, otherwise 503."""
    content = {"status": state.name, "reason": state.reason, "running": running, "waiting": 0}
    await answer_json(send, 200 if state.name == "ready" else 503, content)


def not_ready(state: State) -> ApiError:
    """Return the error of a request to a server in another state than `ready`."""
    return ApiError(
        503, f"the server is {state.name}: {state.reason}", code=f"server_{state.name}", headers={"Retry-After": "5"}
    )


def _no_answer(state: State, error: Exception) -> ApiError:
    if state.name != "ready":
        return not_ready(state)
    return ApiError(502, f"vLLM did not answer ({type(error).__name__}); see the server's log", code="no_answer")


async def _left(receive: Receive) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
