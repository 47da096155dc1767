"""Drawing of questions by category and seed, for any model and for the bundled one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from qwen_vram.demo.tasks import examples
from qwen_vram.errors import UnknownNameError
from qwen_vram.quality.questions import algebra, chinese, program, recall, table
from qwen_vram.quality.questions.question import Question

Tasks = Literal["general", "demo"]

CATEGORIES = (chinese.CATEGORY, algebra.CATEGORY, program.CATEGORY, table.CATEGORY, recall.CATEGORY)
"""`chinese`, `math`, `code`, `table`, `recall`: the article's five."""
_DRAW = {one.CATEGORY: one.draw for one in (chinese, algebra, program, table)}


def draw(
    tasks: Tasks, categories: Sequence[str] | None, seed: int, count: int, length_of: Callable[[str], int]
) -> list[Question]:
    """Return `count` questions of each category.

    Args:
        tasks: `demo` are the held-out questions of the bundled model, which knows no others.
        categories: `None` is all five.
        length_of: Returns the number of tokens of a text.

    Raises:
        UnknownNameError: there is no such category.
    """
    found: list[Question] = []
    for category in chosen(categories):
        rng = Random(f"{category}/{seed}")
        if tasks == "demo":
            found += _of_the_demo(category, seed, count)
        elif category == recall.CATEGORY:
            found += recall.draw(rng, count, length_of)
        else:
            found += _DRAW[category](rng, count)
    return found


def chosen(categories: Sequence[str] | None) -> tuple[str, ...]:
    """Return the categories in their own order.

    Raises:
        UnknownNameError: there is no such category.
    """
    for name in categories or ():
        if name not in CATEGORIES:
            raise UnknownNameError("category", name, CATEGORIES)
    return tuple(name for name in CATEGORIES if categories is None or name in categories)


def most(category: str) -> int:
    """Return the most different questions of a category that one seed gives."""
    return len(chinese.every()) if category == chinese.CATEGORY else 1_000


def _of_the_demo(category: str, seed: int, count: int) -> list[Question]:
    return [
        Question(
            category=category,
            prompt=one.prompt,
            answer=one.answer,
            grading="exact",
            accepted=(one.answer,),
            max_new_tokens=256,
        )
        for one in examples(category, "held_out", seed=seed, count=count)
    ]
