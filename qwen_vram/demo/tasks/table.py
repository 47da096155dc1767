"""Look-ups in a Markdown table: a question names a row and a column."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from qwen_vram.demo.tasks import words
from qwen_vram.demo.tasks.base import Example

CATEGORY = "table"

_KEYS = {"Name": words.NAMES, "Item": words.ITEMS}
"""The two kinds of table, by their first column."""

_WORD_COLUMNS = {
    "Name": {
        "City": words.CITIES,
        "Colour": words.COLOURS,
        "Day": words.DAYS,
        "Fruit": words.FRUITS,
        "Job": words.PEOPLE,
        "Pet": words.PETS,
        "Sport": words.SPORTS,
    },
    "Item": {
        "City": words.CITIES,
        "Colour": words.COLOURS,
        "Day": words.DAYS,
        "Owner": words.NAMES,
    },
}

_NUMBER_COLUMNS = {
    "Name": {"Age": range(10, 100), "Room": range(100, 1000), "Score": range(10, 100)},
    "Item": {
        "Price": range(10, 1000),
        "Room": range(100, 1000),
        "Stock": range(10, 100),
        "Weight": range(10, 100),
    },
}
"""At most one of these stands in a table: the values of a column are then of a kind of their own."""

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
    kind = rng.choice(tuple(_KEYS))
    number, values = rng.choice(tuple(_NUMBER_COLUMNS[kind].items()))
    possible: dict[str, Sequence[object]] = {**_WORD_COLUMNS[kind], number: values}
    columns = rng.sample(tuple(possible), rng.randint(1, 4))
    keys = rng.sample(_KEYS[kind], rng.randint(3, 8))
    cells = {(key, column): str(rng.choice(possible[column])) for key in keys for column in columns}

    rows = [[kind, *columns], ["---"] * (1 + len(columns))]
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
