"""Asking of questions, and the share of right answers by category."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vram.quality.answers.grading import grade
from qwen_vram.quality.intervals import Figure, share
from qwen_vram.quality.questions.question import Question
from qwen_vram.runtime.loaded_model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer with its grade.

    Attributes:
        category: The category of the question.
        question: The last paragraph of the question.
        expected: A right answer.
        answer: The model's answer.
        right: The grade.
        note: The reason why a program is wrong; else empty.
    """

    category: str
    question: str
    expected: str
    answer: str
    right: bool
    note: str = ""


@dataclass(frozen=True)
class Answers:
    """All answers of a model."""

    answers: tuple[Answer, ...]

    def shares(self) -> dict[str, Figure]:
        """Return the share of right answers of each category, and of all as `total`."""
        categories = list(dict.fromkeys(one.category for one in self.answers))
        found = {name: [one.right for one in self.answers if one.category == name] for name in categories}
        found["total"] = [one.right for one in self.answers]
        return {name: share(sum(right), len(right)) for name, right in found.items()}

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return the numbers of right and of all answers of each category, and of all as `total`."""
        found: dict[str, tuple[int, int]] = {}
        for one in self.answers:
            for name in (one.category, "total"):
                right, asked = found.get(name, (0, 0))
                found[name] = (right + one.right, asked + 1)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`."""
        counts = self.counts()
        return {
            "categories": {
                name: {"right": counts[name][0], "asked": counts[name][1], **one.to_dict()}
                for name, one in self.shares().items()
            },
            "answers": [asdict(one) for one in self.answers],
        }


def ask(llm: LoadedModel, questions: Sequence[Question], done: Callable[[], object]) -> Answers:
    """Ask each question by the chat template, without sampling, and grade the answers.

    Args:
        done: Called after each answer.
    """
    found = []
    for one in questions:
        text = str(llm.chat(one.prompt, max_new_tokens=one.max_new_tokens, do_sample=False))
        graded = grade(one, text)
        found.append(
            Answer(
                category=one.category,
                question=one.prompt.rpartition("\n\n")[2],
                expected=one.answer,
                answer=text,
                right=graded.right,
                note=graded.note,
            )
        )
        done()
    return Answers(tuple(found))
