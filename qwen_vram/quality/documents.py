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


# Returns a question in the chat format up to its answer, and the answer with what ends it.
AsChat = Callable[[str, str], tuple[str, str]]


@dataclass(frozen=True)
class Documents:
    """Token ids of each document, all of one length; tokens of the second half are scored.

    Attributes:
        ids: Token ids of each document.
        counts: For each token of the second half, 1 if it is scored. The bundled model is scored on answers alone.
    """

    ids: tuple[tuple[int, ...], ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of a document."""
        return len(self.ids[0])

    @property
    def context(self) -> int:
        """Tokens of the first half, which are only read."""
        return self.length // 2

    @property
    def predicted(self) -> int:
        """Tokens of the second half of one document."""
        return self.length - self.context

    @property
    def digest(self) -> str:
        """A hash of all token ids."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()


def documents(
    tasks: Tasks, seed: int, count: int, length: int, encode: Callable[[str], list[int]], as_chat: AsChat
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
    ids, counts = [], []
    for number in range(count):
        if tasks == "general":
            ending = encode(passages[number % len(passages)])[:length]
            made = [(token, 1) for token in ending]
        else:
            made = []
        before: list[tuple[int, int]] = []
        part = 0
        while len(before) + len(made) < length:
            before += _chat(tasks, number + part, rng, encode, as_chat)
            part += 1
        tokens = (before + made)[-length:]
        half = tuple(counted for _, counted in tokens[length // 2 :])
        ids.append(tuple(token for token, _ in tokens))
        # A short document can have no answer in its second half.
        counts.append(half if any(half) else tuple(1 for _ in half))
    return Documents(tuple(ids), tuple(counts))


def _chat(
    tasks: Tasks, number: int, rng: Random, encode: Callable[[str], list[int]], as_chat: AsChat
) -> list[tuple[int, int]]:
    """Return the tokens of a question and its answer, each with 1 if it is scored."""
    categories = _SHORT if tasks == "general" else CATEGORIES
    category = categories[number % len(categories)]
    one: Question = draw(tasks, (category,), rng.randrange(2**31), 1, len)[0]
    question, answer = as_chat(one.prompt, one.answer)
    if tasks == "general":
        return [(token, 1) for token in encode(question + answer)]
    # It learned neither to predict questions, nor what the template writes after the token that ends an answer.
    scored = len(encode(one.answer)) + 1
    ending = [(token, int(number < scored)) for number, token in enumerate(encode(answer))]
    return [(token, 0) for token in encode(question)] + ending
