"""Settings of a server, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import qwen_vram as qv


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a server.

    Attributes:
        name: The name of the model in requests and answers.
        host, port: The address to listen on; port 0 is a free one.
        api_key: The key that each request must have; `None` is no key.
        max_waiting: The most requests in the queue.
        max_wait: The most seconds in the queue.
        max_body: The most bytes of a body.
        body_seconds: The most seconds until a body is complete.
        heartbeat: Seconds of silence after which a stream gets a comment.
        grace: Seconds that a stopped server gives the running requests.
        origins: Origins of web pages that may read answers; `*` is all.
        allowed_hosts: Names in the `Host` header; empty allows the names of this machine on a loopback address, and all
            on another address.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_waiting: int = 100
    max_wait: float = 600.0
    max_body: int = 4 * 2**20
    body_seconds: float = 30.0
    heartbeat: float = 15.0
    grace: float = 30.0
    origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (("port", 0, 65535), ("max_waiting", 0, 100_000), ("max_body", 1024, 2**30)):
            _check(name, getattr(self, name), low, high)
        for name, least in (("max_wait", 0.0), ("body_seconds", 0.1), ("heartbeat", 0.01), ("grace", 0.0)):
            _check(name, getattr(self, name), least, 86_400.0)
        if not self.name.strip():
            raise qv.WorkloadError("--served-model-name must not be empty", name="name", got=self.name)
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            # The key itself is in no message.
            raise qv.WorkloadError("the API key must be ASCII characters, not empty", name="api_key", got="***")


def _check(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        option = f"--{name.replace('_', '-')}"
        raise qv.WorkloadError(f"{option} must be from {low:,} to {high:,}, got {value!r}", name=name, got=value)
