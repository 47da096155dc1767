"""Recall from a long text: facts between sentences of filler, of which one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from qwen_vram.quality.questions.question import Question

CATEGORY = "recall"
TOKENS = 4096
"""The fewest tokens of a long text."""
_PLACES = [
    "station",
    "harbour",
    "library",
    "museum",
    "bakery",
    "mill",
    "garden",
    "bridge",
    "school",
    "market",
    "theatre",
    "chapel",
]
_OWNERS = [
    "Adams",
    "Becker",
    "Costa",
    "Dubois",
    "Eriksen",
    "Fischer",
    "Garcia",
    "Huang",
    "Ito",
    "Jansen",
    "Kim",
    "Lopez",
    "Moreau",
    "Novak",
    "Okafor",
    "Petrov",
]
_SUBJECTS = (
    "The old road",
    "A small boat",
    "The northern wall",
    "The morning train",
    "A wooden fence",
    "The lower field",
)
_VERBS = ("passes", "faces", "leads to", "is close to", "can be seen from", "ends near")
_ADJECTIVES = ("quiet", "narrow", "sunny", "crowded", "stony", "green", "distant", "low")


def draw(rng: Random, count: int, length_of: Callable[[str], int], tokens: int = TOKENS) -> list[Question]:
    """Return `count` questions, each about its own text.

    Args:
        length_of: Returns the number of tokens of a text.
        tokens: The fewest tokens of a text.
    """
    found: dict[str, Question] = {}
    while len(found) < count:
        one = _question(rng, length_of, tokens)
        found.setdefault(one.prompt, one)
    return list(found.values())


def _question(rng: Random, length_of: Callable[[str], int], tokens: int) -> Question:
    owners = rng.sample(_OWNERS, 5)
    codes = rng.sample(range(1000, 10_000), 5)
    facts = [f"The access code of {owner} is {code}." for owner, code in zip(owners, codes, strict=True)]
    filler: list[str] = []
    while length_of(" ".join(filler + facts)) < tokens:
        filler += [_sentence(rng) for _ in range(max(1, tokens // 60))]
    for number, fact in enumerate(facts):
        filler.insert(rng.randrange(len(filler) + number), fact)
    asked = rng.randrange(5)
    return Question(
        category=CATEGORY,
        prompt=" ".join(filler) + f"\n\nWhat is the access code of {owners[asked]}? Write the number alone.",
        answer=str(codes[asked]),
        grading="number",
        accepted=(str(codes[asked]),),
        max_new_tokens=32,
    )


def _sentence(rng: Random) -> str:
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} {rng.choice(_PLACES)}."
