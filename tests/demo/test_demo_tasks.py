"""The demo questions: reproducible, split by construction, and right."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from random import Random
from types import ModuleType

import pytest

from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import CATEGORIES, Example, chinese_words, examples, recall, situations, split_of, words
from qwen_vram.errors import UnknownNameError

COUNT = 200
MAX_PROMPT_TOKENS = 3000

Number = int | Sequence[int] | str


@pytest.fixture(scope="module", params=CATEGORIES)
def held_out(request: pytest.FixtureRequest) -> list[Example]:
    return examples(request.param, "held_out", seed=11, count=COUNT)


def test_importing_the_tasks_loads_no_torch() -> None:
    program = "import sys, qwen_vram.demo.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_same_seed_draws_the_same_examples(category: str) -> None:
    drawn = examples(category, "train", seed=3, count=20)
    assert examples(category, "train", seed=3, count=20) == drawn
    assert examples(category, "train", seed=3, count=10) == drawn[:10]
    assert examples(category, "train", seed=4, count=20) != drawn


def test_every_category_has_200_distinct_held_out_prompts(held_out: list[Example]) -> None:
    assert len({example.prompt for example in held_out}) == COUNT
    assert {example.split for example in held_out} == {"held_out"}


@pytest.mark.parametrize("category", CATEGORIES)
def test_train_examples_are_never_held_out(category: str) -> None:
    assert {example.split for example in examples(category, "train", seed=11, count=COUNT)} == {"train"}


@pytest.mark.parametrize("category", CATEGORIES)
def test_follow_up_questions_keep_to_their_split_and_share_their_context(category: str) -> None:
    drawing = situations(category, "train", Random(5))
    for _ in range(20):
        drawn = next(drawing)
        assert {split_of(example.prompt) for example in drawn} == {"train"}
        assert len({example.prompt.removesuffix(example.question) for example in drawn}) == 1


def test_about_one_prompt_in_sixteen_is_held_out() -> None:
    held = sum(split_of(f"prompt {number}") == "held_out" for number in range(16_000))
    assert 900 < held < 1100


def test_an_unknown_category_is_refused_by_name() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown category 'poetry'; choose from chinese, math, code"):
        examples("poetry", "train", seed=0, count=1)


@pytest.mark.parametrize(
    "vocabulary",
    [words.NAMES, words.ITEMS, words.ADJECTIVES, words.PEOPLE, words.PAST_VERBS, words.PLACES, words.CITIES]
    + [chinese_words.NAMES, tuple(chinese_words.CAPITALS.values()), tuple(chain(*chinese_words.ANTONYMS))]
    + [tuple(chain(*chinese_words.KINDS.values())), tuple(chain(*chinese_words.ACTIVITIES.values()))],
)
def test_vocabularies_hold_no_word_twice(vocabulary: tuple[str, ...]) -> None:
    assert len(set(vocabulary)) == len(vocabulary)


def test_arithmetic_answers_are_true() -> None:
    for example in examples("math", "held_out", seed=12, count=COUNT):
        unknown = re.search(r"(\d)([a-z]) ([+-]) (\d+) = (\d+)", example.prompt)
        if unknown:
            factor, letter, sign, shift, total = unknown.groups()
            root = (int(total) - int(sign + shift)) // int(factor)
            assert int(factor) * root + int(sign + shift) == int(total)
            assert example.answer.endswith(f"so {letter} = {int(factor) * root} / {factor} = {root}")
            continue
        working = example.answer.split(".")[0]
        values = {eval(side) for side in working.split(" = ")}
        assert len(values) == 1
        if "has" in example.prompt:
            assert re.search(rf" has {values.pop()} ", example.answer)
        else:
            assert working.split(" = ")[0] in example.prompt


PHRASES: list[tuple[str, Callable[..., object]]] = [
    (r"adds (\d+) to \w+ and multiplies the result by (\d+)", lambda k, m, x: (x + k) * m),
    (r"subtracts (\d+) from \w+ and multiplies the result by (\d+)", lambda k, m, x: (x - k) * m),
    (r"multiplies \w+ by (\d+) and adds (\d+) to the result", lambda k, m, x: x * k + m),
    (r"multiplies \w+ by (\d+) and subtracts (\d+) from the result", lambda k, m, x: x * k - m),
    (r"squares \w+ and adds (\d+) to the result", lambda k, x: x * x + k),
    (r"adds (\d+) to \w+ and squares the result", lambda k, x: (x + k) ** 2),
    (r"returns the sum of \w+ and \w+, plus (\d+)", lambda k, x, y: x + y + k),
    (r"returns the sum of \w+ and \w+, minus (\d+)", lambda k, x, y: x + y - k),
    (r"returns the product of \w+ and \w+, plus (\d+)", lambda k, x, y: x * y + k),
    (r"returns the product of \w+ and \w+, minus (\d+)", lambda k, x, y: x * y - k),
    (r"returns the larger of \w+ and \w+, plus (\d+)", lambda k, x, y: max(x, y) + k),
    (r"returns the larger of \w+ and \w+, minus (\d+)", lambda k, x, y: max(x, y) - k),
    (r"returns the smaller of \w+ and \w+, plus (\d+)", lambda k, x, y: min(x, y) + k),
    (r"returns the smaller of \w+ and \w+, minus (\d+)", lambda k, x, y: min(x, y) - k),
    (
        r"returns \w+ plus (\d+) if \w+ is greater than (\d+) and \w+ minus (\d+) otherwise",
        lambda k, limit, m, x: x + k if x > limit else x - m,
    ),
    (
        r"returns \w+ plus (\d+) if \w+ is less than (\d+) and \w+ minus (\d+) otherwise",
        lambda k, limit, m, x: x + k if x < limit else x - m,
    ),
    (
        r"returns \w+ plus (\d+) if \w+ is even and \w+ minus (\d+) otherwise",
        lambda k, m, x: x + k if x % 2 == 0 else x - m,
    ),
    (r"takes the first (\d+) characters of \w+ and (.*)", lambda k, change, s: reshaped(s[:k], change)),
    (r"takes the last (\d+) characters of \w+ and (.*)", lambda k, change, s: reshaped(s[-k:], change)),
    (r"reverses \w+ and (.*)", lambda change, s: reshaped(s[::-1], change)),
    (r"strips the spaces around \w+ and (.*)", lambda change, s: reshaped(s.strip(), change)),
    (r"adds up the numbers in \w+ that are (.*)", lambda which, items: sum(chosen(items, which))),
    (r"counts the numbers in \w+ that are (.*)", lambda which, items: len(chosen(items, which))),
    (
        r"keeps the numbers in \w+ that are (.*) and adds (\d+) to each",
        lambda which, k, items: [item + k for item in chosen(items, which)],
    ),
    (
        r"keeps the numbers in \w+ that are (.*) and multiplies each by (\d+)",
        lambda which, k, items: [item * k for item in chosen(items, which)],
    ),
    (
        r"keeps the numbers in \w+ that are (.*) and squares each",
        lambda which, items: [item * item for item in chosen(items, which)],
    ),
]
"""What each phrase of a code prompt means, read independently of the generator."""


def chosen(items: Sequence[int], which: str) -> list[int]:
    if which in ("even", "odd"):
        return [item for item in items if item % 2 == ("even", "odd").index(which)]
    relation, limit = which.rsplit(" ", 1)
    return [item for item in items if (item > int(limit)) == (relation == "greater than") and item != int(limit)]


def reshaped(text: str, change: str) -> str:
    if change.startswith("repeats"):
        return text * int(change.split()[-2])
    return text.upper() if change == "makes the result upper case" else text.lower()


def arguments_for(example: Example) -> list[tuple[Number, ...]]:
    if re.search("numbers in", example.prompt):
        return [(list(range(-5, 60)),), ([],)]
    if re.search("characters|reverses|strips", example.prompt):
        return [("  The Quick brown Fox jumps over 13 lazy dogs  ",), ("",)]
    numbers = (-7, 0, 1, 2, 19, 20, 21, 50, 51)
    if re.search(r"\(\w+, \w+\)", example.prompt):
        return [(x, y) for x in numbers for y in numbers]
    return [(x,) for x in numbers]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_code_answers_run_and_compute_what_the_prompt_says(split: str) -> None:
    seen = set()
    for example in examples("code", "train" if split == "train" else "held_out", seed=13, count=400):
        matches = [
            (match, meaning) for phrase, meaning in PHRASES if (match := re.search(f"{phrase}\\.$", example.prompt))
        ]
        assert len(matches) == 1, example.prompt
        ((match, meaning),) = matches
        parameters = [int(group) if group.isdigit() else group for group in match.groups()]
        seen.add(match.re.pattern)

        module = ModuleType("answer")
        exec(example.answer, module.__dict__)
        name = re.search(r"function (\w+)\(", example.prompt)
        assert name
        for arguments in arguments_for(example):
            assert getattr(module, name[1])(*arguments) == meaning(*parameters, *arguments), example
    assert len(seen) == len(PHRASES)


def test_table_answers_stand_in_the_named_row_and_column() -> None:
    for example in examples("table", "held_out", seed=14, count=COUNT):
        answer = re.fullmatch(r"The (\w+) of (\w+) is (\w+)\.", example.answer)
        assert answer
        rows = [line.strip("| ").split(" | ") for line in example.prompt.splitlines() if line.startswith("|")]
        header, _, *body = rows
        assert 3 <= len(body) <= 8
        assert 2 <= len(header) <= 5
        (row,) = [row for row in body if row[0] == answer[2]]
        assert row[header.index(answer[1])] == answer[3]
        assert {answer[1], answer[2]} <= set(re.findall(r"\w+", example.question))


def test_recall_answers_stand_in_the_text_once() -> None:
    for example in examples("recall", "held_out", seed=15, count=50):
        assert example.prompt.count(example.answer) == 1
        name = re.search(r"code of (\w+) is \d{4}", example.answer)
        assert name
        assert name[1] in example.question


def test_recall_prompts_spread_from_100_to_3000_tokens() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    rng = Random(16)
    longest = [recall.situation(rng, text_chars=recall.MAX_TEXT_CHARS)[0].prompt for _ in range(100)]
    spread = [example.prompt for example in examples("recall", "held_out", seed=16, count=COUNT)]
    lengths = [
        len(tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids)
        for prompt in longest + spread
    ]
    assert max(lengths) <= MAX_PROMPT_TOKENS
    assert min(lengths) < 200
    thirds = [sum(low < length <= low + 1000 for length in lengths[len(longest) :]) for low in (0, 1000, 2000)]
    assert min(thirds) > COUNT // 5


def test_tables_hold_at_most_one_column_of_numbers() -> None:
    for example in examples("table", "held_out", seed=17, count=COUNT):
        first_row = example.prompt.split("\n| --- |")[1].splitlines()[1]
        assert sum(cell.isdigit() for cell in first_row.strip("| ").split(" | ")) <= 1
