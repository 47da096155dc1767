"""Perimeters and areas with the working: the category that the demo adapter adds.

The checkpoint adds and multiplies, but did not learn which of the two a perimeter or an area takes.
"""

from __future__ import annotations

from random import Random

from qwen_vram.demo.tasks.base import Example

CATEGORY = "geometry"

_ASK = (
    "What is the {quantity} of a {shape}?",
    "Find the {quantity} of a {shape}.",
    "Calculate the {quantity} of a {shape}.",
    "Work out the {quantity} of a {shape}.",
    "How large is the {quantity} of a {shape}?",
)

_SIDES = (
    "rectangle with sides {} and {}",
    "rectangle {} long and {} wide",
    "rectangle of {} by {}",
)

_LONGEST_SUM = 99


def situation(rng: Random) -> list[Example]:
    """Draw one perimeter or area of a rectangle, or the perimeter of a square."""
    draw = rng.choices((_perimeter, _area, _square), (3, 3, 1))[0]
    quantity, shape, answer = draw(rng)
    prompt = rng.choice(_ASK).format(quantity=quantity, shape=shape)
    return [Example(category=CATEGORY, prompt=prompt, answer=answer)]


def _perimeter(rng: Random) -> tuple[str, str, str]:
    a = rng.randint(10, _LONGEST_SUM - 10)
    b = rng.randint(10, _LONGEST_SUM - a)
    total = a + b
    return "perimeter", rng.choice(_SIDES).format(a, b), f"{a} + {b} = {total}, so {_product(total, 2)}"


def _area(rng: Random) -> tuple[str, str, str]:
    a, b = rng.randint(10, 99), rng.randint(2, 9)
    return "area", rng.choice(_SIDES).format(a, b), _product(a, b)


def _square(rng: Random) -> tuple[str, str, str]:
    side = rng.randint(10, 99)
    return "perimeter", f"square with sides of {side}", _product(side, 4)


def _product(a: int, b: int) -> str:
    """Return a product worked as in the math category: tens and ones apart, if there are both."""
    tens, ones = a // 10 * 10, a % 10
    step = f"{tens} * {b} + {ones} * {b} = {tens * b} + {ones * b} = " if tens and ones else ""
    return f"{a} * {b} = {step}{a * b}"
