"""The interface of an engine, which is all that the web server uses of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_vram.serving.engine.answer import Answer
from qwen_vram.serving.engine.work_queue import Handle, WorkQueue
from qwen_vram.serving.wire.events import Event
from qwen_vram.serving.wire.requests import Wanted


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request with its answers, which have not started."""

    answers: tuple[Answer, ...]
    prompt_tokens: int


class Engine(Protocol):
    """Runner of requests. The web server uses these names alone, so another engine can replace this one."""

    queue: WorkQueue

    def prepare(self, wanted: Wanted) -> Prepared:
        """Check a request completely, and raise an `ApiError` if it cannot run. It allocates nothing on the device."""

    def submit(self, prepared: Prepared, deliver: Callable[[Event], None]) -> Handle:
        """Put a request into the queue, or raise an `ApiError`; its events are delivered from any thread."""

    def state(self) -> tuple[str, str]:
        """Return `loading`, `ready`, `stopping` or `failed`, with a reason."""

    def running(self) -> int:
        """Return the number of requests that run now."""

    def report(self) -> dict[str, Any]:
        """Return predicted and measured memory as `qv.LoadedModel.report().to_dict()`; empty before the load."""
