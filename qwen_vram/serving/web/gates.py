"""Gates before the routes: name of the host, API key, type and size of a body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Collection

from qwen_vram.serving.web.asgi import App, Message, Receive, Scope, Send, header, refuse
from qwen_vram.serving.wire.problem import ApiError

# Names of this machine for itself, in a `Host` header.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
# Paths that need no key, because a container's probe has none.
_OPEN = ("/health",)


def is_loopback(host: str) -> bool:
    """Tell if only this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class HostGate:
    """Refusal of other names in `Host`. A web page whose name points to this machine cannot read answers then.

    Args:
        names: Allowed names; empty allows all.
    """

    def __init__(self, app: App, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 421."""
        if scope["type"] == "http" and self._names and _host_of(scope) not in self._names:
            error = ApiError(
                421,
                f"this server answers under the names {', '.join(sorted(self._names))}; start it with --allowed-host "
                "for another one",
                code="wrong_host",
            )
            await refuse(send, error)
            return
        await self._app(scope, receive, send)


def _host_of(scope: Scope) -> str:
    """Return the name in `Host`, without its port."""
    host = (header(scope, b"host") or b"").decode("latin-1").strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class KeyGate:
    """Refusal of requests without the API key, which is compared in constant time."""

    def __init__(self, app: App, key: str | None) -> None:
        self._app = app
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and self._key is not None and scope["path"] not in _OPEN:
            scheme, _, given = (header(scope, b"authorization") or b"").partition(b" ")
            # Digests have one length, so the time does not depend on the length of the key.
            same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._key)
            if scheme.lower() != b"bearer" or not same:
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refuse(send, error)
                return
        await self._app(scope, receive, send)


class BodyGate:
    """Reading of each body before its route, with limits of its size and its time.

    Args:
        most: The most bytes of a body.
        seconds: The most seconds until it is complete.
    """

    def __init__(self, app: App, *, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or answer 408, 413 or 415."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            body = await asyncio.wait_for(self._read(receive), self._seconds)
        except asyncio.TimeoutError:
            late = f"the body was not complete after {self._seconds:g} s"
            await refuse(send, ApiError(408, late, code="timeout", headers={"Connection": "close"}))
            return
        except ApiError as error:
            await refuse(send, error)
            return
        if body is None:  # the client is gone
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            first, whole = whole, None
            return first

        await self._app(scope, replay, send)

    def _check_headers(self, scope: Scope) -> None:
        length = header(scope, b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 15 or int(length) > self._most):
            raise self._too_large()
        kind = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            # A web page can send other types to this machine without asking.
            raise ApiError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
        if header(scope, b"content-encoding") not in (None, b"identity"):
            raise ApiError(415, "a compressed body is not supported; send plain JSON", code="unsupported_media_type")

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._most:
                raise self._too_large()
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than {self._most:,} bytes, the most here; start the server with --max-body for more",
            code="body_too_large",
        )
