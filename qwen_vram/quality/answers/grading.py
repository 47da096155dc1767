"""Grading of answers without a judge: exact texts, short texts, numbers and programs."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from qwen_vram.quality.answers.sandbox import run_program
from qwen_vram.quality.questions.question import Question

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Grade(NamedTuple):
    """The result of one answer; `note` says why a program is wrong."""

    right: bool
    note: str = ""


def grade(question: Question, answer: str) -> Grade:
    """Grade an answer."""
    if question.grading == "exact":
        return Grade(answer.strip() in question.accepted)
    if question.grading == "number":
        return Grade(_number(answer) == Fraction(question.accepted[0]))
    if question.grading == "text":
        return Grade(any(_names(answer, one) for one in question.accepted))
    return _program(question, answer)


def _normal(text: str) -> str:
    """Return the text in one form of its characters, without commas between digits."""
    found = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    return re.sub(r"(?<=\d),(?=\d{3})", "", found)


def _number(answer: str) -> Fraction | None:
    """Return the first number after the last "answer", or else the last number of the answer."""
    text = _normal(answer)
    _, found, after = text.lower().rpartition("answer")
    named = _NUMBER.search(after) if found else None
    if named is not None:
        return Fraction(named[0])
    numbers = _NUMBER.findall(text)
    return Fraction(numbers[-1]) if numbers else None


def _names(answer: str, accepted: str) -> bool:
    """Tell if the first line of an answer has the accepted text; a Latin one as a whole word in the same case."""
    line = next((one for one in _normal(answer).splitlines() if one.strip()), "")
    if accepted.isascii():
        return re.search(rf"(?<![A-Za-z0-9]){re.escape(accepted)}(?![A-Za-z0-9])", line) is not None
    return accepted in line.replace(" ", "")


def code_of(answer: str) -> str:
    """Return the first block of code of an answer, or the answer itself if it has none."""
    found = _FENCE.search(answer)
    return found[1] if found else answer


def _program(question: Question, answer: str) -> Grade:
    ran = run_program(code_of(answer), question.function, question.calls)
    if ran.values is None:
        return Grade(False, ran.error or "")
    for call, value, expected in zip(question.calls, ran.values, question.expected, strict=False):
        if value != expected:
            arguments = ", ".join(map(repr, call))
            return Grade(False, f"{question.function}({arguments}) is {value!r}, expected {expected!r}"[:200])
    return Grade(len(ran.values) == len(question.expected))
