"""Python functions to write: tasks with a right solution, and calls with their values."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

from qwen_vram.quality.questions.question import Question

CATEGORY = "code"
_CALLS = 5
_NAMES = ("compute", "solve", "process", "evaluate", "transform", "result_of", "helper", "answer_for")


class Task(NamedTuple):
    """A task.

    Attributes:
        text: The behaviour of the function, with its parameters in braces.
        arguments: The arguments as the signature has them.
        body: Lines of a right solution.
        kinds: The kind of each argument: `n` (a small number), `ns` (numbers), `s` (a text), `ss` (texts).
        parameters: Ranges of the numbers in braces.
    """

    text: str
    arguments: str
    body: str
    kinds: tuple[str, ...]
    parameters: dict[str, range]


_K = range(2, 10)
TASKS = (
    Task("the sum of the numbers in the list that are divisible by {k}", "numbers",
         "return sum(n for n in numbers if n % {k} == 0)", ("ns",), {"k": _K}),
    Task("the number of elements of the list that are greater than {k}", "numbers",
         "return sum(1 for n in numbers if n > {k})", ("ns",), {"k": range(5, 40)}),
    Task("the list with each number multiplied by {k}, in the same order", "numbers",
         "return [n * {k} for n in numbers]", ("ns",), {"k": _K}),
    Task("the text reversed and repeated {k} times", "text", "return text[::-1] * {k}", ("s",), {"k": range(2, 6)}),
    Task("the number of vowels (a, e, i, o, u) in the text, plus {k}", "text",
         "return sum(1 for c in text if c in 'aeiou') + {k}", ("s",), {"k": _K}),
    Task("True if n is a prime number greater than {k}, and False otherwise", "n",
         "return n > {k} and n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))", ("n",), {"k": range(2, 20)}),
    Task("the sum of the squares of the whole numbers from 1 to n, plus {k}", "n",
         "return sum(i * i for i in range(1, n + 1)) + {k}", ("n",), {"k": _K}),
    Task("the {k} largest numbers of the list, in descending order", "numbers",
         "return sorted(numbers, reverse=True)[:{k}]", ("ns",), {"k": range(2, 5)}),
    Task("a dict that maps each word of the list to its length plus {k}", "words",
         "return {{word: len(word) + {k} for word in words}}", ("ss",), {"k": _K}),
    Task("the words of the list that have more than {k} letters, in the same order", "words",
         "return [word for word in words if len(word) > {k}]", ("ss",), {"k": range(3, 6)}),
    Task("n factorial (the product of the whole numbers from 1 to n) multiplied by {k}", "n",
         "product = {k}\nfor i in range(2, n + 1):\n    product *= i\nreturn product", ("n",), {"k": _K}),
    Task("the greatest common divisor of a and b, times {k}", "a, b",
         "while b:\n    a, b = b, a % b\nreturn a * {k}", ("n", "n"), {"k": _K}),
    Task("the difference of the largest and the smallest number of the list, plus {k}", "numbers",
         "return max(numbers) - min(numbers) + {k}", ("ns",), {"k": _K}),
    Task("the list without duplicates, in the order of first appearance, cut to at most {k} elements", "numbers",
         "found = []\nfor n in numbers:\n    if n not in found:\n        found.append(n)\nreturn found[:{k}]",
         ("ns",), {"k": range(3, 7)}),
    Task("the sum of the decimal digits of n, multiplied by {k}", "n",
         "return sum(int(d) for d in str(n)) * {k}", ("n",), {"k": _K}),
    Task("the text with each letter 'a' replaced by '{k}', in upper case", "text",
         "return text.replace('a', '{k}').upper()", ("s",), {"k": _K}),
)  # fmt: skip
_WORDS = [
    "banana",
    "orange",
    "river",
    "window",
    "table",
    "apple",
    "garden",
    "silver",
    "planet",
    "camera",
    "ocean",
    "letter",
    "idea",
    "echo",
    "data",
    "area",
]


def draw(rng: Random, count: int) -> list[Question]:
    """Return `count` different questions, of each task in turn."""
    found: dict[str, Question] = {}
    while len(found) < count:
        one = _question(rng, TASKS[len(found) % len(TASKS)])
        found.setdefault(one.prompt, one)
    return list(found.values())


def _question(rng: Random, task: Task) -> Question:
    given = {name: rng.choice(values) for name, values in task.parameters.items()}
    function = rng.choice(_NAMES)
    body = task.body.format(**given).replace("\n", "\n    ")
    source = f"def {function}({task.arguments}):\n    {body}\n"
    calls = tuple(tuple(_argument(rng, kind) for kind in task.kinds) for _ in range(_CALLS))
    defined: dict[str, Any] = {}
    exec(compile(source, "<solution>", "exec"), defined)  # text of this file alone
    expected = tuple(defined[function](*call) for call in calls)
    prompt = (
        f"Write a Python function {function}({task.arguments}) that returns {task.text.format(**given)}. "
        "Reply with the code alone."
    )
    return Question(
        category=CATEGORY,
        prompt=prompt,
        answer=f"```python\n{source}```",
        grading="program",
        function=function,
        calls=calls,
        expected=expected,
        max_new_tokens=256,
    )


def _argument(rng: Random, kind: str) -> Any:
    if kind == "n":
        return rng.randint(1, 30)
    if kind == "ns":
        return [rng.randint(1, 60) for _ in range(rng.randint(5, 9))]
    if kind == "s":
        return rng.choice(_WORDS)
    return rng.sample(_WORDS, 5)
