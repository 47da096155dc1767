"""Grading: answers as models write them, right and wrong."""

import pytest

from qwen_vram.quality.answers.grading import code_of, grade
from qwen_vram.quality.questions.question import Question

pytestmark = pytest.mark.no_torch


def question(grading, accepted, **more):
    return Question(category="x", prompt="", answer=accepted[0], grading=grading, accepted=accepted, **more)


@pytest.mark.parametrize(
    ("accepted", "answer", "right"),
    [
        ("5", "2x = 10, so x = 5.\nAnswer: 5", True),
        ("5", "**Answer:** $5$", True),
        ("5", "The answer is 5, because 5 * 2 = 10.", True),
        ("5", "2x = 10, so x = 5", True),
        ("5", "Answer: 15", False),
        ("5", "Answer: -5", False),
        ("-5", "Answer: \u22125", True),
        ("5", "Answer: 5.0", True),
        ("1813", "Answer: 1,813", True),
        ("5", "I do not know.", False),
        ("5", "", False),
    ],
)
def test_numbers(accepted, answer, right):
    assert grade(question("number", (accepted,)), answer).right is right


@pytest.mark.parametrize(
    ("accepted", "answer", "right"),
    [
        (("巴黎",), "法国的首都是巴黎。", True),
        (("巴黎",), "伦敦", False),
        (("巴黎",), "伦敦\n巴黎", False),
        (("H",), "氢的元素符号是H。", True),
        (("H",), "He", False),
        (("2300",), "２,３００", True),
        (("钱钟书", "钱锺书"), "钱锺书", True),
        (("Hana",), "Hana has the largest value.", True),
        (("Hana",), "Ivan", False),
        (("Hana",), "", False),
    ],
)
def test_short_texts(accepted, answer, right):
    assert grade(question("text", accepted), answer).right is right


def test_programs_with_and_without_a_fence_and_with_words_around_it():
    asked = question("program", ("",), function="f", calls=((2,), (3,)), expected=(4, 9))
    code = "def f(n):\n    return n * n\n"
    for answer in (
        code,
        f"```python\n{code}```",
        f"Here it is:\n\n```\n{code}```\nIt squares n.",
        f"```python\n{code}",
    ):
        assert grade(asked, answer).right
    wrong = grade(asked, "def f(n):\n    return n + 2")
    assert wrong == (False, "f(3) is 5, expected 9")
    assert code_of(f"```py\n{code}```\n```py\nf(2)\n```") == code


def test_a_program_that_loops_costs_one_answer_alone(monkeypatch):
    monkeypatch.setattr("qwen_vram.quality.answers.sandbox.run_program.__kwdefaults__", {"seconds": 1.0})
    asked = question("program", ("",), function="f", calls=((2,),), expected=(4,))
    answers = ("def f(n):\n    while 1: pass", "def f(n):\n    return 2 * n")
    assert [grade(asked, one).right for one in answers] == [False, True]


def test_exact_texts():
    assert grade(question("exact", ("a b",)), " a b\n").right
    assert not grade(question("exact", ("a b",)), "a  b").right
