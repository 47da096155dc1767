"""Questions: different ones for each seed, enough of them, and answers that are right by another computation."""

import re

import pytest

import qwen_vram as qv
from qwen_vram.quality.answers.grading import grade
from qwen_vram.quality.questions import chinese, program
from qwen_vram.quality.questions.draw import CATEGORIES, chosen, draw

pytestmark = pytest.mark.no_torch


def words(text):
    """A number of tokens that needs no tokenizer."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_category_has_40_different_questions_and_others_with_another_seed(category):
    first, again, other = (draw("general", [category], seed, 40, words) for seed in (0, 0, 1))
    assert first == again
    prompts, others = ({one.prompt for one in found} for found in (first, other))
    assert len(prompts) == len(others) == 40
    # Facts are drawn from a table of 240 questions, and programs from 16 tasks with parameters.
    assert len(prompts & others) <= (15 if category == "chinese" else 8)


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_known_answer_is_right_and_that_to_another_question_is_wrong(category):
    found = draw("general", [category], 3, 16, words)
    for one in found:
        assert grade(one, one.answer).right, one
    wrong = [grade(one, other.answer).right for one, other in zip(found, found[1:])]
    assert sum(wrong) <= 2  # two tables can have the same answer


def test_the_facts_are_enough_and_each_question_has_one_answer():
    every = chinese.every()
    assert len(every) >= 120
    assert len({one.prompt for one in every}) == len(every)


def test_a_long_text_is_over_4096_tokens_and_holds_the_answer_once():
    for one in draw("general", ["recall"], 0, 3, words):
        assert words(one.prompt) > 4096
        assert one.prompt.count(one.answer) == 1


def test_linear_equations_hold():
    found = [
        one
        for one in draw("general", ["math"], 5, 80, words)
        if re.match(r"Solve for x: -?\d+x [+-]\d+ = ", one.prompt)
    ]
    assert len(found) >= 5
    for one in found:
        a, b, right = map(int, re.search(r"(-?\d+)x ([+-]\d+) = (-?\d+)", one.prompt).groups())
        if one.prompt.count("x") == 2:  # of "x:" and of one side
            assert a * int(one.accepted[0]) + b == right


def test_largest_values_and_sums_of_tables_are_right():
    found = draw("general", ["table"], 6, 40, words)
    for one in found:
        lines = [line.strip("| ").split(" | ") for line in one.prompt.splitlines() if line.startswith("| ")]
        head, rows = lines[0], lines[1:]
        column = next(
            (name for name in head[2:] if f" {name} " in one.prompt or f" {name}?" in one.prompt.split("\n\n")[1]), None
        )
        asked = one.prompt.split("\n\n")[1]
        if "largest" in asked:
            column = head.index(re.search(r"largest value of (\w+)", asked)[1])
            assert one.answer == max(rows, key=lambda row: int(row[column]))[0]
        elif "sum" in asked:
            name, first, second = re.search(r"sum of (\w+) of (\w+) and (\w+)", asked).groups()
            values = {row[0]: int(row[head.index(name)]) for row in rows}
            assert int(one.answer) == values[first] + values[second]


def test_every_task_of_programs_is_drawn():
    found = draw("general", ["code"], 0, len(program.TASKS), words)
    assert len({re.sub(r"\d+", "N", one.prompt.partition("returns ")[2]) for one in found}) == len(program.TASKS)


def test_the_bundled_models_questions_are_its_own():
    (one,) = draw("demo", ["math"], 0, 1, words)
    assert one.grading == "exact"
    assert one.accepted == (one.answer,)


def test_an_unknown_category_is_refused():
    with pytest.raises(
        qv.UnknownNameError, match="unknown category 'poems'; choose from chinese, math, code"
    ) as caught:
        chosen(["math", "poems"])
    assert caught.value.got == "poems"
