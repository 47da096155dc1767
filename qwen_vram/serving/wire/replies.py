"""Answers as JSON objects of OpenAI's API: whole, and as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from qwen_vram.serving.wire.events import Call, Ended, Logprob, Piece


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Replies:
    """Maker of the objects of one request, which share an id and a time.

    Args:
        chat: Of `/v1/chat/completions`, otherwise of `/v1/completions`.
        answers: The number of answers.
        logprobs: The request asks for log probabilities.
    """

    def __init__(self, model: str, *, chat: bool, answers: int, logprobs: bool) -> None:
        self._chat, self._logprobs = chat, logprobs
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._calls = [0] * answers
        self._offsets = [0] * answers
        self._begun = [False] * answers

    def whole(self, pieces: Sequence[Piece], ends: Sequence[Ended], prompt_tokens: int) -> dict[str, Any]:
        """Return the object of a complete request."""
        choices = []
        for end in ends:
            own = [piece for piece in pieces if piece.index == end.index]
            text = "".join(piece.text for piece in own)
            calls = [call for piece in own for call in piece.calls]
            logprobs = [one for piece in own for one in piece.logprobs]
            choice: dict[str, Any] = {"index": end.index, "finish_reason": end.reason}
            choice["logprobs"] = self._logprobs_of(logprobs, end.index) if self._logprobs else None
            if self._chat:
                content = None if calls and not text.strip() else text
                choice["message"] = {"role": "assistant", "content": content, "refusal": None}
                if calls:
                    choice["message"]["tool_calls"] = [_call(call) for call in calls]
            else:
                choice["text"] = text
            choices.append(choice)
        tokens = usage(prompt_tokens, sum(end.tokens for end in ends))
        return {**self._head, "object": self._object(""), "choices": choices, "usage": tokens}

    def chunks(self, event: Piece | Ended, *, with_usage: bool) -> list[dict[str, Any]]:
        """Return the chunks of an event; with `with_usage` they have a `usage` of null, as in OpenAI's streams."""
        found = []
        if self._chat and not self._begun[event.index]:
            found.append(self._delta(event.index, {"role": "assistant", "content": ""}))
        self._begun[event.index] = True
        if isinstance(event, Ended):
            found.append(self._choice(event.index, {"delta": {}} if self._chat else {"text": ""}, reason=event.reason))
        else:
            logprobs = self._logprobs_of(event.logprobs, event.index) if event.logprobs else None
            if not self._chat:
                found.append(self._choice(event.index, {"text": event.text}, logprobs))
            elif event.text or logprobs:
                found.append(self._delta(event.index, {"content": event.text}, logprobs))
            for call in event.calls:
                at = self._calls[event.index]
                self._calls[event.index] += 1
                found.append(self._delta(event.index, {"tool_calls": [{"index": at, **_call(call)}]}))
        return [{**one, "usage": None} for one in found] if with_usage else found

    def usage_chunk(self, tokens: dict[str, int]) -> dict[str, Any]:
        """Return the last chunk of a stream, with the numbers of tokens."""
        return {**self._head, "object": self._object(".chunk"), "choices": [], "usage": tokens}

    def _object(self, end: str) -> str:
        return f"chat.completion{end}" if self._chat else "text_completion"

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return self._choice(index, {"delta": delta}, logprobs)

    def _choice(
        self, index: int, content: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self._object(".chunk"), "choices": [choice]}

    def _logprobs_of(self, made: Sequence[Logprob], index: int) -> dict[str, Any]:
        if self._chat:
            content = [
                {**_token(one.text, one.data, one.logprob), "top_logprobs": [_token(*other) for other in one.top]}
                for one in made
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for one in made:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(one.text)
        return {
            "tokens": [one.text for one in made],
            "token_logprobs": [one.logprob for one in made],
            "top_logprobs": [{text: value for text, _, value in one.top} for one in made],
            "text_offset": offsets,
        }


def _token(text: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(data)}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
