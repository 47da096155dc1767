"""Recall from a long text: names and their codes, planted between sentences of filler."""

from __future__ import annotations

from random import Random

from qwen_vram.demo.tasks import words
from qwen_vram.demo.tasks.base import Example, decapitalize

CATEGORY = "recall"

MIN_TEXT_CHARS = 380
MAX_TEXT_CHARS = 14_000
"""Text lengths in characters. With the demo tokenizer a prompt is then 100 to 3,000 tokens long;
`tests/demo/test_demo_tasks.py` holds it to that."""

_OPENINGS = (
    "Read the text and answer the question.",
    "Here is a text with some codes in it.",
    "Remember the codes in this text.",
    "Please read this carefully.",
)

_QUESTIONS = (
    "What is the code of {name}?",
    "Which code belongs to {name}?",
    "Tell me the code of {name}.",
    "Do you remember the code of {name}?",
    "I need the code of {name}.",
)


def situation(rng: Random, *, text_chars: int | None = None) -> list[Example]:
    """Draw one text and a question about each name in it, in random order.

    Args:
        rng: Source of every choice.
        text_chars: Length of the text in characters, give or take one sentence; drawn evenly from
            `MIN_TEXT_CHARS` to `MAX_TEXT_CHARS` when `None`.
    """
    if text_chars is None:
        text_chars = rng.randint(MIN_TEXT_CHARS, MAX_TEXT_CHARS)
    most_codes = min(12, 2 + text_chars // 150)
    names = rng.sample(words.NAMES, rng.randint(3, most_codes))
    codes = [str(code) for code in rng.sample(range(1000, 10_000), len(names))]

    sentences = [_fact(name, code) for name, code in zip(names, codes, strict=True)]
    length = sum(len(sentence) + 1 for sentence in sentences)
    while length < text_chars:
        sentence = _filler(rng)
        length += len(sentence) + 1
        sentences.append(sentence)
    rng.shuffle(sentences)
    context = f"{rng.choice(_OPENINGS)}\n\n{' '.join(sentences)}"

    pairs = list(zip(names, codes, strict=True))
    rng.shuffle(pairs)
    return [
        Example(
            category=CATEGORY,
            prompt=f"{context}\n\n{rng.choice(_QUESTIONS).format(name=name)}",
            answer=_fact(name, code),
        )
        for name, code in pairs
    ]


def _fact(name: str, code: str) -> str:
    return f"The code of {name} is {code}."


def _filler(rng: Random) -> str:
    choice = rng.choice
    person, other = (f"the {person}" for person in rng.sample(words.PEOPLE, 2))
    thing = f"the {choice(words.ADJECTIVES)} {choice(words.ITEMS)}"
    place = f"{choice(words.PREPOSITIONS)} the {choice(words.PLACES)}"
    match rng.randrange(5):
        case 0:
            sentence = f"{person} {choice(words.PAST_VERBS)} {thing} {place}."
        case 1:
            sentence = f"{thing} {place} was {choice(words.ADJECTIVES)}."
        case 2:
            sentence = f"{person} and {other} {choice(words.PAST_VERBS)} {thing}."
        case 3:
            sentence = f"there was a {choice(words.ADJECTIVES)} {choice(words.PLACES)} {place}."
        case _:
            sentence = f"nobody {choice(words.PAST_VERBS)} {thing} of {person}."
    if rng.random() < 0.3:
        return f"{choice(words.TIMES)}, {decapitalize(sentence)}"
    return sentence[0].upper() + sentence[1:]
