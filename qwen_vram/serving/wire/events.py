"""Events of a request, which an engine delivers in order."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vram.serving.wire.problem import ApiError


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token of an answer with its log probability and the likeliest tokens; `data` is the bytes of its `text`."""

    text: str
    data: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool: the function's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Began:
    """The request left the queue and runs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: text, calls of tools, and tokens with log probabilities. Each may be empty."""

    index: int
    text: str
    calls: tuple[Call, ...] = ()
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer, by its reason: `stop`, `length` or `tool_calls`; and the number of generated tokens."""

    index: int
    reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Done:
    """All answers of the request are complete."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends with an error."""

    error: ApiError


@dataclass(frozen=True, slots=True)
class Gone:
    """The client closed the connection."""


Event = Began | Piece | Ended | Done | Failed | Gone
