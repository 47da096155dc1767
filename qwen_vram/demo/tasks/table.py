"""Look-ups in a Markdown table: one row is named, one column is named, the cell is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from qwen_vram.demo.tasks import words
from qwen_vram.demo.tasks.base import Example

CATEGORY = "table"

_KEYS: dict[str, Sequence[str]] = {
    "Name": words.NAMES,
    "Item": words.ITEMS,
}


def _one_of(values: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)


def _number(low: int, high: int) -> Callable[[Random], str]:
    return lambda rng: str(rng.randint(low, high))


_PERSON_COLUMNS: dict[str, Callable[[Random], str]] = {
    "Age": _number(10, 99),
    "City": _one_of(words.CITIES),
    "Colour": _one_of(words.COLOURS),
    "Day": _one_of(words.DAYS),
    "Fruit": _one_of(words.FRUITS),
    "Job": _one_of(words.JOBS),
    "Pet": _one_of(words.PETS),
    "Room": _number(100, 999),
    "Score": _number(10, 99),
    "Sport": _one_of(words.SPORTS),
}

_ITEM_COLUMNS: dict[str, Callable[[Random], str]] = {
    "City": _one_of(words.CITIES),
    "Colour": _one_of(words.COLOURS),
    "Day": _one_of(words.DAYS),
    "Owner": _one_of(words.NAMES),
    "Price": _number(10, 999),
    "Room": _number(100, 999),
    "Stock": _number(10, 99),
    "Weight": _number(10, 99),
}

_COLUMNS = {"Name": _PERSON_COLUMNS, "Item": _ITEM_COLUMNS}

_OPENINGS = (
    "Here is a table.",
    "Look at this table.",
    "Answer the question about this table.",
)

_QUESTIONS = (
    "What is the {column} of {key}?",
    "Find the {column} of {key}.",
    "Look up the {column} of {key}.",
    "Which {column} belongs to {key}?",
)

_MOST_QUESTIONS = 6


def situation(rng: Random) -> list[Example]:
    """Draw one table of 3 to 8 rows and 2 to 5 columns, and up to six questions about it."""
    key_column = rng.choice(tuple(_KEYS))
    columns = rng.sample(tuple(_COLUMNS[key_column]), rng.randint(1, 4))
    keys = rng.sample(_KEYS[key_column], rng.randint(3, 8))
    cells = {(key, column): _COLUMNS[key_column][column](rng) for key in keys for column in columns}

    rows = [[key_column, *columns], ["---"] * (1 + len(columns))]
    rows += [[key, *(cells[key, column] for column in columns)] for key in keys]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    context = f"{rng.choice(_OPENINGS)}\n\n{table}"

    asked = rng.sample(sorted(cells), min(_MOST_QUESTIONS, len(cells)))
    return [
        Example(
            category=CATEGORY,
            prompt=f"{context}\n\n{rng.choice(_QUESTIONS).format(key=key, column=column)}",
            answer=f"The {column} of {key} is {cells[key, column]}.",
        )
        for key, column in asked
    ]
