"""Shared parts of all categories: the example, the split, and helpers for sentences."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 16
"""One prompt in this many is held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    r"""One question and the only answer that counts as right.

    It has no chat markup and no tokens: `prompt` is the text of the user's turn, and `answer` is the text of the
    assistant's.

    A prompt about a given text or table is `"<context>\n\n<question>"`, and the question itself
    never holds an empty line.
    """

    category: str
    prompt: str
    answer: str

    @property
    def question(self) -> str:
        """The prompt without its context, which is the text of a follow-up turn."""
        return self.prompt.rpartition("\n\n")[2]

    @property
    def split(self) -> Split:
        """The split that this prompt belongs to, for every seed that draws it."""
        return split_of(self.prompt)


def split_of(prompt: str) -> Split:
    """Assign a prompt to its split by its text alone, so that no seed can leak one into the other.

    `"held_out"` when `sha256(prompt) % 16 == 0`, read as a big-endian integer.

    Example:
        >>> split_of("What is 347 + 285?")
        'train'
    """
    last_byte = hashlib.sha256(prompt.encode()).digest()[-1]
    return "held_out" if last_byte % HELD_OUT_SHARE == 0 else "train"


def decapitalize(sentence: str) -> str:
    """Lower the first letter, for a sentence that moves behind an opening phrase."""
    return sentence[:1].lower() + sentence[1:]
