"""Questions about a Markdown table: a cell, a largest value, a count, and a sum."""

from __future__ import annotations

from random import Random

from qwen_vram.quality.questions.question import Question

CATEGORY = "table"
_NAMES = [
    "Alice",
    "Bruno",
    "Chen",
    "Dara",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ivan",
    "Jun",
    "Kofi",
    "Lena",
    "Mei",
    "Nils",
    "Olga",
    "Pavel",
    "Qing",
    "Rosa",
    "Sven",
    "Tara",
    "Uma",
    "Viktor",
    "Wen",
    "Yusuf",
    "Zoe",
]
_CITIES = ["Lyon", "Oslo", "Turin", "Porto", "Graz", "Cork", "Bergen", "Ghent", "Brno", "Kobe", "Quito", "Leeds"]
_COLUMNS = ("Orders", "Returns", "Stock", "Price", "Score", "Hours")
_ENDING = "\n\nWrite the answer alone, without an explanation."


def draw(rng: Random, count: int) -> list[Question]:
    """Return `count` different questions, each about its own table."""
    found: dict[str, Question] = {}
    while len(found) < count:
        one = _question(rng, len(found) % 4)
        if one.answer:
            found.setdefault(one.prompt, one)
    return list(found.values())


def _question(rng: Random, kind: int) -> Question:
    names = rng.sample(_NAMES, rng.randint(5, 8))
    columns = rng.sample(_COLUMNS, 3)
    drawn = [(rng.choice(_CITIES), rng.sample(range(2, 99), 3)) for _ in names]
    cities, numbers = [city for city, _ in drawn], [row for _, row in drawn]
    lines = [f"| Name | City | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {city} | {' | '.join(map(str, row))} |"
        for name, city, row in zip(names, cities, numbers, strict=True)
    ]
    values = {columns[number]: [row[number] for row in numbers] for number in range(3)}
    column = rng.choice(columns)
    number = rng.randrange(len(names))
    if kind == 0:
        asked, answer = f"What is the value of {column} for {names[number]}?", str(values[column][number])
    elif kind == 1:
        asked, answer = f"Which city is in the row of {names[number]}?", cities[number]
    elif kind == 2:
        column, answer = _largest(columns, values, names, rng)
        asked = f"Who has the largest value of {column}?"
    else:
        other = (number + 1) % len(names)
        asked = f"What is the sum of {column} of {names[number]} and {names[other]}?"
        answer = str(values[column][number] + values[column][other])
    return Question(
        category=CATEGORY,
        prompt="\n".join(lines) + f"\n\n{asked}{_ENDING}",
        answer=answer,
        grading="number" if answer.isdecimal() else "text",
        accepted=(answer,),
        max_new_tokens=64,
    )


def _largest(columns: list[str], values: dict[str, list[int]], names: list[str], rng: Random) -> tuple[str, str]:
    """Return a column with one largest value, and the name in its row; the name is empty if there is no such column."""
    single = [name for name in columns if values[name].count(max(values[name])) == 1]
    column = rng.choice(single or columns)
    return column, names[values[column].index(max(values[column]))] if single else ""
