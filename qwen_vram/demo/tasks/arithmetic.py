"""Arithmetic on whole numbers and linear equations, with a short worked step if it helps."""

from __future__ import annotations

from random import Random

from qwen_vram.demo.tasks import words
from qwen_vram.demo.tasks.base import Example

CATEGORY = "math"

_ASK = (
    "What is {}?",
    "Calculate {}.",
    "Compute {}.",
    "How much is {}?",
    "Work out {}.",
)

_SOLVE = (
    "Solve {equation}.",
    "Solve for {unknown}: {equation}.",
    "Find {unknown} if {equation}.",
    "What is {unknown} if {equation}?",
)

_GOODS = words.split_words(
    "apples books bottles boxes candles coins cups eggs flowers lemons letters pencils plates shells stamps stones"
)


def situation(rng: Random) -> list[Example]:
    """Draw one sum, difference, product, equation or short word problem."""
    draw = rng.choice((_sum, _difference, _product, _equation, _word_problem))
    prompt, answer = draw(rng)
    return [Example(category=CATEGORY, prompt=prompt, answer=answer)]


def _sum(rng: Random) -> tuple[str, str]:
    a, b = _operand(rng), _operand(rng)
    expression = f"{a} + {b}"
    return rng.choice(_ASK).format(expression), f"{expression} = {a + b}"


def _difference(rng: Random) -> tuple[str, str]:
    b, a = sorted((_operand(rng), _operand(rng)))
    expression = f"{a} - {b}"
    return rng.choice(_ASK).format(expression), f"{expression} = {a - b}"


def _product(rng: Random) -> tuple[str, str]:
    a, b = rng.randint(2, 99), rng.randint(2, 9)
    expression = f"{a} * {b}"
    tens, ones = a // 10 * 10, a % 10
    step = f"{tens} * {b} + {ones} * {b} = {tens * b} + {ones * b} = " if tens and ones else ""
    return rng.choice(_ASK).format(expression), f"{expression} = {step}{a * b}"


def _equation(rng: Random) -> tuple[str, str]:
    unknown = rng.choice("abknxyz")
    factor, root, shift = rng.randint(2, 9), rng.randint(2, 20), rng.randint(1, 50)
    product = factor * root
    if rng.random() < 0.5 and product > shift:
        equation = f"{factor}{unknown} - {shift} = {product - shift}"
        step = f"{product - shift} + {shift}"
    else:
        equation = f"{factor}{unknown} + {shift} = {product + shift}"
        step = f"{product + shift} - {shift}"
    prompt = rng.choice(_SOLVE).format(unknown=unknown, equation=equation)
    answer = f"{factor}{unknown} = {step} = {product}, so {unknown} = {product} / {factor} = {root}"
    return prompt, answer


def _word_problem(rng: Random) -> tuple[str, str]:
    name, goods = rng.choice(words.NAMES), rng.choice(_GOODS)
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    match rng.randrange(3):
        case 0:
            story = f"{name} has {a} {goods} and gets {b} more."
            working, result = f"{a} + {b}", a + b
        case 1:
            a, b = max(a, b), min(a, b)
            story = f"{name} has {a} {goods} and gives away {b}."
            working, result = f"{a} - {b}", a - b
        case _:
            a, b = rng.randint(2, 9), rng.randint(2, 9)
            story = f"{name} has {a} bags with {b} {goods} each."
            working, result = f"{a} * {b}", a * b
    prompt = f"{story} How many {goods} does {name} have now?"
    return prompt, f"{working} = {result}. {name} has {result} {goods}."


def _operand(rng: Random) -> int:
    return rng.randint(10, 99) if rng.random() < 0.4 else rng.randint(100, 999)
