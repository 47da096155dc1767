"""Texts and bytes of single tokens, for log probabilities."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from qwen_vram.serving.wire.events import Logprob

# The least log probability in answers, because JSON has no infinity. OpenAI's API reference names this value.
_LEAST = -9999.0


class TokenBytes:
    """Reader of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.added_tokens_decoder)

    def of(self, number: int) -> tuple[str, bytes]:
        """Return the text of a token, with replacement characters for parts of a character, and its exact bytes."""
        whole = str(self._tokenizer.decode([number]))
        if number in self._special:
            return whole, whole.encode()
        word = self._tokenizer.convert_ids_to_tokens(number)
        known = _byte_of_character()
        if isinstance(word, str) and all(one in known for one in word):
            data = bytes(known[one] for one in word)
            if data.decode("utf-8", "replace") == whole:
                return whole, data
        return whole, whole.encode()

    def logprob(self, token: Any) -> Logprob:
        """Return a generated token with its alternatives."""
        top = tuple((*self.of(number), max(_LEAST, value)) for number, value in token.top)
        return Logprob(*self.of(token.id), max(_LEAST, token.logprob), top)


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character stands for in byte-level vocabularies.

    Source: openai/gpt-2, src/encoder.py, `bytes_to_unicode`: printable bytes stand for themselves, and the others have
    the characters from U+0100 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
