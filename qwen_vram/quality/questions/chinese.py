"""Chinese questions about facts with a short answer."""

from __future__ import annotations

from random import Random

from qwen_vram.quality.questions.chinese_facts import FACTS
from qwen_vram.quality.questions.question import Question

CATEGORY = "chinese"
_ENDING = "只写答案，不要解释。"


def every() -> list[Question]:
    """Return every question that the facts give, in both directions if both have one answer."""
    found = []
    for facts in FACTS:
        for first, second in facts.pairs:
            found.append(_question(facts.forward, first, second))
            if facts.backward:
                found.append(_question(facts.backward, second, first))
    return found


def draw(rng: Random, count: int) -> list[Question]:
    """Return `count` different questions."""
    return rng.sample(every(), count)


def _question(template: str, given: str, asked: str) -> Question:
    accepted = tuple(asked.split("/"))
    prompt = template.format(given.partition("/")[0]) + _ENDING
    return Question(
        category=CATEGORY, prompt=prompt, answer=accepted[0], grading="text", accepted=accepted, max_new_tokens=32
    )
