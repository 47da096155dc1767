"""Basic algebra with whole numbers as results."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from qwen_vram.quality.questions.question import Question

CATEGORY = "math"
_ENDING = " Show short steps, and end with a line 'Answer: ' and the number."


def draw(rng: Random, count: int) -> list[Question]:
    """Return `count` different questions, of each kind in turn."""
    found: dict[str, Question] = {}
    while len(found) < count:
        prompt, steps, result = _KINDS[len(found) % len(_KINDS)](rng)
        prompt += _ENDING
        found.setdefault(
            prompt,
            Question(
                category=CATEGORY,
                prompt=prompt,
                answer=f"{steps}\nAnswer: {result}",
                grading="number",
                accepted=(str(result),),
                max_new_tokens=256,
            ),
        )
    return list(found.values())


def _linear(rng: Random) -> tuple[str, str, int]:
    a, x, b = rng.randint(2, 9), rng.randint(-12, 12), rng.randint(-20, 20)
    right = a * x + b
    return f"Solve for x: {a}x {b:+d} = {right}.", f"{a}x = {right - b}, so x = {right - b} / {a} = {x}.", x


def _both_sides(rng: Random) -> tuple[str, str, int]:
    x, c = rng.randint(-9, 9), rng.randint(1, 5)
    a, b = c + rng.randint(1, 6), rng.randint(-15, 15)
    d = (a - c) * x + b
    return f"Solve for x: {a}x {b:+d} = {c}x {d:+d}.", f"{a - c}x = {d - b}, so x = {x}.", x


def _system(rng: Random) -> tuple[str, str, int]:
    x, y = rng.randint(1, 15), rng.randint(1, 15)
    return (
        f"Two numbers x and y satisfy x + y = {x + y} and x - y = {x - y}. Find x.",
        f"Adding both equations gives 2x = {2 * x}, so x = {x}.",
        x,
    )


def _polynomial(rng: Random) -> tuple[str, str, int]:
    a, b, c, x = rng.randint(1, 5), rng.randint(-9, 9), rng.randint(-9, 9), rng.randint(-5, 6)
    result = a * x * x + b * x + c
    text = f"Let f(x) = {a}x^2 {b:+d}x {c:+d}. Find f({x})."
    return text, f"{a}*{x * x} + {b}*({x}) + {c} = {a * x * x} + {b * x} + {c} = {result}.", result


def _larger_root(rng: Random) -> tuple[str, str, int]:
    first, second = rng.sample(range(-9, 10), 2)
    middle, last, larger = -(first + second), first * second, max(first, second)
    text = f"Find the larger root of x^2 {middle:+d}x {last:+d} = 0."
    return text, f"The equation factors as (x - ({first}))(x - ({second})) = 0.", larger


def _sequence(rng: Random) -> tuple[str, str, int]:
    start, step, count = rng.randint(1, 20), rng.randint(2, 9), rng.randint(8, 30)
    result = start + (count - 1) * step
    text = (
        f"An arithmetic sequence begins with {start}, {start + step}, {start + 2 * step}. Find its term number {count}."
    )
    return text, f"{start} + {count - 1} * {step} = {result}.", result


def _percent(rng: Random) -> tuple[str, str, int]:
    percent, whole = 5 * rng.randint(1, 19), 20 * rng.randint(2, 60)
    result = percent * whole // 100
    return f"What is {percent}% of {whole}?", f"{percent} * {whole} / 100 = {result}.", result


def _ages(rng: Random) -> tuple[str, str, int]:
    young, times, years = rng.randint(4, 14), rng.randint(2, 4), rng.randint(2, 9)
    total = young + times * young + 2 * years
    text = (
        f"Ann is {times} times as old as Ben. In {years} years, their ages will add up to {total}. "
        "How old is Ben today?"
    )
    return text, f"b + {times}b + {2 * years} = {total}, so {times + 1}b = {total - 2 * years} and b = {young}.", young


_KINDS: tuple[Callable[[Random], tuple[str, str, int]], ...] = (
    _linear,
    _both_sides,
    _system,
    _polynomial,
    _larger_root,
    _sequence,
    _percent,
    _ages,
)
