"""The demo adapter and its category: true questions, an adapter that PEFT reads, and a skill that merging keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from qwen_vram.demo import ADAPTER
from qwen_vram.demo.tasks import CATEGORIES, SKILL, Example, examples

COUNT = 20


@pytest.fixture(scope="module")
def asked() -> list[Example]:
    return examples(SKILL, "held_out", seed=2026, count=COUNT)


def right_answers(model: torch.nn.Module, folder: Path, asked: list[Example]) -> int:
    from transformers import AutoTokenizer

    from training.evaluate import answer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    given = answer(model.eval(), tokenizer, [example.prompt for example in asked], batch_size=COUNT)
    return sum(example.answer == text for example, text in zip(asked, given))


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_the_skill_is_a_sixth_category() -> None:
    assert len(CATEGORIES) == 5
    assert SKILL not in CATEGORIES


def test_the_same_seed_draws_the_same_examples() -> None:
    drawn = examples(SKILL, "train", seed=3, count=200)
    assert examples(SKILL, "train", seed=3, count=200) == drawn
    assert {example.split for example in drawn} == {"train"}
    assert len({example.prompt for example in examples(SKILL, "held_out", seed=3, count=200)}) == 200


def test_answers_are_true() -> None:
    seen = set()
    for example in examples(SKILL, "held_out", seed=12, count=200):
        sides = [int(number) for number in re.findall(r"\d+", example.prompt)]
        quantity = "area" if "area" in example.prompt else "perimeter"
        seen.add((quantity, len(sides)))
        if len(sides) == 1:
            sides *= 2
        assert int(example.answer.split()[-1]) == (sides[0] * sides[1] if quantity == "area" else 2 * sum(sides))
        for working in example.answer.split(", so "):
            assert len({eval(side) for side in working.split(" = ")}) == 1, example
    assert seen == {("area", 2), ("perimeter", 2), ("perimeter", 1)}


def test_the_base_alone_does_not_have_the_skill(demo: Path, asked: list[Example]) -> None:
    assert right_answers(load(demo), demo, asked) < 0.2 * COUNT


def test_peft_loads_the_adapter_and_it_has_the_skill(demo: Path, asked: list[Example]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(load(demo), ADAPTER)
    assert right_answers(model, demo, asked) >= 0.9 * COUNT


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merging_and_quantizing_keep_the_skill(
    quantize: str | None, demo: Path, asked: list[Example], tmp_path: Path
) -> None:
    from qwen_vram.lora.merge import merge_lora_then_quantize

    merge_lora_then_quantize(demo, ADAPTER, tmp_path / "merged", quantize=quantize, progress=False)
    assert right_answers(load(tmp_path / "merged"), demo, asked) >= 0.9 * COUNT


def test_the_adapter_names_its_base_without_a_path_of_the_machine_it_was_trained_on() -> None:
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "qwen_vram/demo/checkpoint"
    assert set(config["target_modules"]) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
