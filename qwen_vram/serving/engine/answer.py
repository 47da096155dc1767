"""One answer while it is generated: from tokens to events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwen_vram.serving.engine.answer_text import AnswerText
from qwen_vram.serving.engine.token_bytes import TokenBytes
from qwen_vram.serving.engine.tool_calls import ToolCalls
from qwen_vram.serving.wire.events import Ended, Event, Logprob, Piece


class Answer:
    """One answer of a request.

    Args:
        index: Its number in the request.
        calls: The reader of calls of tools, if the request has tools.
        tokens: The reader of log probabilities, if the request asks for them.

    Attributes:
        stream: The stream of its tokens, which has been checked and not started.
        made: The number of generated tokens.
    """

    def __init__(self, index: int, text: AnswerText, calls: ToolCalls | None, tokens: TokenBytes | None) -> None:
        self.index = index
        self.stream: Any = None
        self.made = 0
        self._text, self._calls, self._tokens = text, calls, tokens
        self._logprobs: list[Logprob] = []
        self._deliver: Callable[[Event], None] = lambda event: None

    def begin(self, deliver: Callable[[Event], None]) -> None:
        """Note the receiver of events."""
        self._deliver = deliver

    def take(self, token: Any) -> bool:
        """Take a generated token, and return true if a stop text ends the answer with it."""
        self.made += 1
        if self.stream.is_end(token):
            return False
        if self._tokens is not None:
            self._logprobs.append(self._tokens.logprob(token))
        self._send(self._text.feed(token.id))
        return self._text.stopped

    def finish(self) -> None:
        """Deliver the rest of the answer and its end."""
        self._send(self._text.finish(), last=True)
        reason = self.stream.finish_reason
        if self._calls is not None and self._calls.found and reason == "stop":
            reason = "tool_calls"
        self._deliver(Ended(self.index, reason, self.made))

    def drop(self) -> None:
        """Drop the stream, which refers to this answer."""
        self.stream = None
        self._deliver = lambda event: None

    def _send(self, text: str, *, last: bool = False) -> None:
        calls: tuple[Any, ...] = ()
        if self._calls is not None:
            text, calls = self._calls.feed(text, last=last)
        if text or calls or self._logprobs:
            logprobs, self._logprobs = tuple(self._logprobs), []
            self._deliver(Piece(self.index, text, calls, logprobs))
