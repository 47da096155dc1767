"""Seeded questions that train and test the demo checkpoint and its adapter.

The checkpoint learned five categories. The demo adapter adds the sixth, `SKILL`, which the checkpoint does not know.

The module uses the standard library only. The split of a prompt depends on its text alone (`split_of`), so no other
seed can train on a held-out prompt.

Example:
    >>> [example] = examples("math", "held_out", seed=7, count=1)
    >>> example.split
    'held_out'

Modules:
    arithmetic     Arithmetic on whole numbers and linear equations, with a short worked step if it helps.
    base           Shared parts of all categories: the example, the split, and helpers for sentences.
    chinese        Chinese questions on facts of a small closed world, counting, and short passages.
    chinese_words  Facts and vocabulary of the closed world that the Chinese questions ask about.
    geometry       Perimeters and areas with the working: the category that the demo adapter adds.
    program        Short Python functions, composed from a grammar of operations, names and arguments.
    recall         Recall from a long text: names and their codes, planted between sentences of filler.
    table          Look-ups in a Markdown table: a question names a row and a column.
    words          The closed English vocabulary that the English categories draw from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from qwen_vram.demo.tasks import arithmetic, chinese, geometry, program, recall, table
from qwen_vram.demo.tasks.base import Example, Split, split_of
from qwen_vram.errors import UnknownNameError

__all__ = ["CATEGORIES", "SKILL", "Example", "Split", "examples", "situations", "split_of"]

_LEARNED: dict[str, Callable[[Random], list[Example]]] = {
    chinese.CATEGORY: chinese.situation,
    arithmetic.CATEGORY: arithmetic.situation,
    program.CATEGORY: program.situation,
    table.CATEGORY: table.situation,
    recall.CATEGORY: recall.situation,
}

CATEGORIES: tuple[str, ...] = tuple(_LEARNED)
"""`chinese`, `math`, `code`, `table`, `recall`: the order every report uses."""

SKILL: str = geometry.CATEGORY
"""`geometry`: the category of the demo adapter (`qwen_vram.demo.ADAPTER`)."""

_SITUATIONS = {**_LEARNED, SKILL: geometry.situation}


def situations(category: str, split: Split, rng: Random) -> Iterator[list[Example]]:
    """Draw without end: each item holds the examples of `split` about one drawn situation.

    Examples of one item share their context; the next item has a fresh one.

    Raises:
        UnknownNameError: `category` is neither in `CATEGORIES` nor `SKILL`.
    """
    if category not in _SITUATIONS:
        raise UnknownNameError("category", category, tuple(_SITUATIONS))
    draw = _SITUATIONS[category]
    while True:
        drawn = [example for example in draw(rng) if example.split == split]
        if drawn:
            yield drawn


def examples(category: str, split: Split, seed: int, count: int) -> list[Example]:
    """Draw `count` examples with distinct prompts, no two about the same context.

    The same arguments give the same list on every machine and Python version that draws `random.Random` alike (3.10 to
    3.14 do). A longer list starts with the shorter one.

    Raises:
        UnknownNameError: `category` is neither in `CATEGORIES` nor `SKILL`.
    """
    rng = Random(f"{category}/{split}/{seed}")
    chosen: dict[str, Example] = {}
    for drawn in situations(category, split, rng):
        if len(chosen) >= count:
            break
        chosen.setdefault(drawn[0].prompt, drawn[0])
    return list(chosen.values())
