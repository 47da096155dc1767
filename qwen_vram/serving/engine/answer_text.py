"""The text of an answer, token by token: whole characters, and the end before a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character in UTF-8 has at most four bytes, so three tokens at most can be an incomplete one.
_INCOMPLETE = 3
_REPLACEMENT = "\ufffd"


class AnswerText:
    """Decoder of one answer, which gives text as soon as no later token can change it.

    Args:
        decode: Returns the text of token ids.
        stops: Texts that end the answer before them.

    Attributes:
        stopped: A stop text was found; the answer is complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._ids: list[int] = []
        # The ids from `_begin` are decoded together. Those before `_end` gave whole characters.
        self._begin = self._end = 0
        self._given = 0  # characters of the ids from `_begin` that were taken
        self._held = ""  # text that may be the beginning of a stop text
        self.stopped = False

    def feed(self, token: int) -> str:
        """Take a token, and return the text that is certain now."""
        self._ids.append(token)
        text = self._decode(self._ids[self._begin :])
        whole = text
        for _ in range(_INCOMPLETE):
            whole = whole.removesuffix(_REPLACEMENT)
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if whole == text:
            self._begin, self._end = self._end, len(self._ids)
            self._given = len(self._decode(self._ids[self._begin : self._end]))
        return self._without_stops(new)

    def finish(self) -> str:
        """Return the rest of the text after the last token."""
        rest = self._without_stops(self._decode(self._ids[self._begin :])[self._given :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _without_stops(self, new: str) -> str:
        """Return the text that no stop text can begin in, or all of it before a stop text."""
        if self.stopped:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
