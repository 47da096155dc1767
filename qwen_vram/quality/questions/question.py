"""A question with its known answer, and the kinds of grading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# exact: the whole answer. text: one of the accepted texts in the first line. number: the last number of the answer.
# program: the function returns the expected values.
Grading = Literal["exact", "text", "number", "program"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        category: One of `CATEGORIES`.
        prompt: The text of the user's turn.
        answer: A right answer, as a model would write it.
        grading: The method of grading.
        accepted: The texts that count as right, for `exact`, `text` and `number`.
        function: The name of the function that a program defines.
        calls: Arguments of each call of it.
        expected: The value of each call.
        max_new_tokens: The most tokens of an answer.
    """

    category: str
    prompt: str
    answer: str
    grading: Grading
    accepted: tuple[str, ...] = ()
    function: str = ""
    calls: tuple[tuple[Any, ...], ...] = ()
    expected: tuple[Any, ...] = ()
    max_new_tokens: int = 48
