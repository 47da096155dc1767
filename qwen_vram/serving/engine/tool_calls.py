"""Calls of tools in an answer, as Qwen's chat templates ask for them."""

from __future__ import annotations

import json
from collections.abc import Collection

from qwen_vram.serving.wire.events import Call

# Source: the chat template of Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json: "return a json object with function name
# and arguments within <tool_call></tool_call> XML tags".
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ToolCalls:
    """Reader of an answer's text, which separates calls of tools from the rest.

    A block that is not a call of a known tool stays text.

    Args:
        names: The tools of the request.

    Attributes:
        found: The number of calls so far.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self.found = 0

    def feed(self, text: str, *, last: bool = False) -> tuple[str, tuple[Call, ...]]:
        """Take a piece of text, and return the text and the calls that are certain now."""
        self._held += text
        words, calls = "", []
        while True:
            at = self._held.find(_OPEN)
            if at < 0:
                keep = 0 if last else _open_tail(self._held)
                words += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            end = self._held.find(_CLOSE, at)
            if end < 0:
                if last:
                    words, self._held = words + self._held, ""
                else:
                    before = self._held[:at].rstrip()
                    words, self._held = words + before, self._held[len(before) :]
                break
            block = self._held[at : end + len(_CLOSE)]
            call = self._call(block[len(_OPEN) : -len(_CLOSE)])
            if call is None:
                words += self._held[:at] + block
            else:
                calls.append(call)
                words += self._held[:at].rstrip()
            self._held = self._held[end + len(_CLOSE) :]
        self.found += len(calls)
        return words, tuple(calls)

    def _call(self, text: str) -> Call | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        arguments = value.get("arguments", {})
        if not isinstance(arguments, (dict, str)):
            return None
        return Call(
            value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )


def _open_tail(text: str) -> int:
    """Return the length of the end of `text` that may begin a call, with the white space before it."""
    size = next((n for n in range(min(len(text), len(_OPEN) - 1), 0, -1) if text.endswith(_OPEN[:n])), 0)
    rest = text[: len(text) - size]
    return size + len(rest) - len(rest.rstrip())
