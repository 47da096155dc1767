"""Documents of the distance: token ids of questions with answers, then a sample text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from qwen_vram.quality.passages import PASSAGES
from qwen_vram.quality.questions.draw import CATEGORIES, Tasks, draw
from qwen_vram.quality.questions.question import Question

_SHORT = tuple(name for name in CATEGORIES if name != "recall")  # a long text has more tokens than a document


@dataclass(frozen=True)
class Documents:
    """Token ids of each document, all of one length; the tokens of the second half are scored.

    Attributes:
        ids: Token ids of each document.
    """

    ids: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of a document."""
        return len(self.ids[0])

    @property
    def context(self) -> int:
        """Tokens of the first half, which are only read."""
        return self.length // 2

    @property
    def scored(self) -> int:
        """Predicted tokens of one document: the second half."""
        return self.length - self.context

    @property
    def digest(self) -> str:
        """A hash of all token ids."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()


def documents(
    tasks: Tasks,
    seed: int,
    count: int,
    length: int,
    encode: Callable[[str], list[int]],
    as_chat: Callable[[str, str], str],
) -> Documents:
    """Return `count` documents of `length` tokens.

    A document for any model ends with a sample text, before which there are questions with their answers. For the
    bundled model, it has its own questions alone. Another seed gives other questions and another order of the texts.

    Args:
        encode: Returns the token ids of a text.
        as_chat: Returns a question and its answer in the chat format.
    """
    rng = Random(f"documents/{seed}")
    passages = rng.sample(PASSAGES, len(PASSAGES))
    found = []
    for number in range(count):
        ending = encode(passages[number % len(passages)])[:length] if tasks == "general" else []
        before: list[int] = []
        part = 0
        while len(before) + len(ending) < length:
            category = (
                _SHORT[(number + part) % len(_SHORT)] if tasks == "general" else CATEGORIES[part % len(CATEGORIES)]
            )
            before += encode(_chat(tasks, category, rng, as_chat))
            part += 1
        found.append(tuple((before + ending)[-length:]))
    return Documents(tuple(found))


def _chat(tasks: Tasks, category: str, rng: Random, as_chat: Callable[[str, str], str]) -> str:
    one: Question = draw(tasks, (category,), rng.randrange(2**31), 1, len)[0]
    return as_chat(one.prompt, one.answer)
