"""Short Python functions, composed from a grammar of operations, names and arguments."""

from __future__ import annotations

from random import Random

from qwen_vram.demo.tasks.base import Example
from qwen_vram.demo.tasks.words import split_words

CATEGORY = "code"

_VERBS = split_words(
    """
    adjust apply build change compute convert derive edit find fix get make measure modify pick
    prepare process run shape transform tune update
    """
)
_NOUNS = split_words(
    """
    amount answer balance count data entry figure grade height label level line list length mark
    message number output point price rate result score size speed step sum text total value
    weight width word
    """
)
_NUMBER_NAMES = split_words("a b count k m n number size total value x y")
_LIST_NAMES = split_words("data entries items numbers row scores values")
_TEXT_NAMES = split_words("label line message name s text title word")

_ASK = (
    "Write a Python function {name} that {task}.",
    "Please write a Python function {name} that {task}.",
    "Define a Python function {name} that {task}.",
    "I need a Python function {name} that {task}.",
)


def situation(rng: Random) -> list[Example]:
    """Draw one function to write."""
    draw = rng.choice((_chain, _pair, _branch, _aggregate, _selection, _text))
    arguments, task, body = draw(rng)
    name = f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}"
    signature = f"{name}({', '.join(arguments)})"
    lines = "\n".join(f"    {line}" for line in body)
    return [
        Example(
            category=CATEGORY,
            prompt=rng.choice(_ASK).format(name=signature, task=task),
            answer=f"def {signature}:\n{lines}",
        )
    ]


_Drawn = tuple[list[str], str, list[str]]
"""Argument names, what the function does in English, and the lines of its body."""


def _chain(rng: Random) -> _Drawn:
    x = rng.choice(_NUMBER_NAMES)
    k, m = rng.randint(2, 20), rng.randint(2, 20)
    task, expression = rng.choice(
        (
            (f"adds {k} to {x} and multiplies the result by {m}", f"({x} + {k}) * {m}"),
            (f"subtracts {k} from {x} and multiplies the result by {m}", f"({x} - {k}) * {m}"),
            (f"multiplies {x} by {k} and adds {m} to the result", f"{x} * {k} + {m}"),
            (f"multiplies {x} by {k} and subtracts {m} from the result", f"{x} * {k} - {m}"),
            (f"squares {x} and adds {k} to the result", f"{x} ** 2 + {k}"),
            (f"adds {k} to {x} and squares the result", f"({x} + {k}) ** 2"),
        )
    )
    return [x], task, [f"return {expression}"]


def _pair(rng: Random) -> _Drawn:
    x, y = rng.sample(_NUMBER_NAMES, 2)
    k = rng.randint(2, 20)
    quantity, expression = rng.choice(
        (
            (f"the sum of {x} and {y}", f"{x} + {y}"),
            (f"the product of {x} and {y}", f"{x} * {y}"),
            (f"the larger of {x} and {y}", f"max({x}, {y})"),
            (f"the smaller of {x} and {y}", f"min({x}, {y})"),
        )
    )
    change, operator = rng.choice(((f"plus {k}", f"+ {k}"), (f"minus {k}", f"- {k}")))
    return [x, y], f"returns {quantity}, {change}", [f"return {expression} {operator}"]


def _branch(rng: Random) -> _Drawn:
    x = rng.choice(_NUMBER_NAMES)
    limit, k, m = rng.randint(2, 50), rng.randint(2, 20), rng.randint(2, 20)
    relation, comparison = rng.choice(
        (
            (f"is greater than {limit}", f"> {limit}"),
            (f"is less than {limit}", f"< {limit}"),
            ("is even", "% 2 == 0"),
        )
    )
    task = f"returns {x} plus {k} if {x} {relation} and {x} minus {m} otherwise"
    body = [f"if {x} {comparison}:", f"    return {x} + {k}", f"return {x} - {m}"]
    return [x], task, body


def _condition(rng: Random) -> tuple[str, str]:
    limit = rng.randint(2, 50)
    return rng.choice(
        (
            (f"greater than {limit}", f"item > {limit}"),
            (f"less than {limit}", f"item < {limit}"),
            ("even", "item % 2 == 0"),
            ("odd", "item % 2 == 1"),
        )
    )


def _aggregate(rng: Random) -> _Drawn:
    items = rng.choice(_LIST_NAMES)
    description, condition = _condition(rng)
    verb, growth = rng.choice((("adds up", "item"), ("counts", "1")))
    body = [
        "result = 0",
        f"for item in {items}:",
        f"    if {condition}:",
        f"        result += {growth}",
        "return result",
    ]
    return [items], f"{verb} the numbers in {items} that are {description}", body


def _selection(rng: Random) -> _Drawn:
    items = rng.choice(_LIST_NAMES)
    description, condition = _condition(rng)
    k = rng.randint(2, 20)
    change, value = rng.choice(
        (
            (f"adds {k} to each", f"item + {k}"),
            (f"multiplies each by {k}", f"item * {k}"),
            ("squares each", "item ** 2"),
        )
    )
    task = f"keeps the numbers in {items} that are {description} and {change}"
    return [items], task, [f"return [{value} for item in {items} if {condition}]"]


def _text(rng: Random) -> _Drawn:
    s = rng.choice(_TEXT_NAMES)
    k = rng.randint(2, 20)
    first, middle = rng.choice(
        (
            (f"takes the first {k} characters of {s}", f"{s}[:{k}]"),
            (f"takes the last {k} characters of {s}", f"{s}[-{k}:]"),
            (f"reverses {s}", f"{s}[::-1]"),
            (f"strips the spaces around {s}", f"{s}.strip()"),
        )
    )
    m = rng.randint(2, 20)
    second, end = rng.choice(
        (
            ("makes the result upper case", ".upper()"),
            ("makes the result lower case", ".lower()"),
            (f"repeats the result {m} times", f" * {m}"),
        )
    )
    return [s], f"{first} and {second}", [f"return {middle}{end}"]
