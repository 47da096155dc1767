"""The limit that torch's allocator gets while a generation runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_vram as qv
from qwen_vram.runtime.beside import Beside
from qwen_vram.runtime.segments import Segments

CARD = 16 * 2**30
DEVICE = torch.device("cuda", 0)
MODEL = "Qwen2.5-0.5B-Instruct"


class Card:
    """torch's calls on a GPU's allocator, which this machine has not: what was set is kept."""

    def __init__(self) -> None:
        self.fraction, self.allocated = 1.0, 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    properties = type("Properties", (), {"total_memory": CARD})()
    calls = {
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: properties,
        "get_per_process_memory_fraction": lambda device: card.fraction,
        "set_per_process_memory_fraction": lambda fraction, device: setattr(card, "fraction", fraction),
        "memory_allocated": lambda device: card.allocated,
    }
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call, raising=False)
    monkeypatch.setattr("qwen_vram.runtime.beside._take_workspace", lambda device: None)
    return card


def segments_of(plan: qv.Plan, before: int = 0) -> Segments:
    """The segments of a model that is loaded now, into a process that had `before` bytes allocated."""
    return Segments(plan, [DEVICE], Beside({DEVICE: before}))


def planned(**knobs: Any) -> qv.Plan:
    return qv.plan(MODEL, vram="8GiB", prompt_len=512, max_new_tokens=64, **knobs)


def reserved(plan: qv.Plan) -> int:
    return plan.estimate.process_total - plan.estimate.beside_torch


def limit_of(card: Card) -> int:
    return round(card.fraction * CARD)


def test_a_planned_generation_is_limited_to_the_promise(card: Card) -> None:
    plan = planned()
    segments = segments_of(plan)
    with segments.within("shape", promised=True):
        assert limit_of(card) == reserved(plan)
    assert card.fraction == 1.0


def test_a_generation_over_the_plan_is_limited_to_the_budget(card: Card) -> None:
    plan = planned()
    segments = segments_of(plan)
    with segments.within("shape", promised=False):
        assert limit_of(card) == 8 * 2**30 - plan.estimate.beside_torch


def test_tensors_of_the_caller_stay_beside_the_promise(card: Card) -> None:
    plan = planned()
    card.allocated = 3 * 2**30
    segments = segments_of(plan, before=2**30)
    with segments.within("shape", promised=True):
        assert limit_of(card) == reserved(plan) + 2**30
    card.allocated += 2**20
    with segments.within("shape", promised=True):
        assert limit_of(card) == reserved(plan) + 2**30 + 2**20
        card.allocated += 2**28  # a cache that the generation leaves there
    with segments.within("shape", promised=True):
        assert limit_of(card) == reserved(plan) + 2**30 + 2**20
    card.allocated -= 2**30
    with segments.within("shape", promised=True):
        assert limit_of(card) == reserved(plan) + 2**20


def test_models_that_generate_at_once_have_room_for_both_promises(card: Card) -> None:
    one, other = planned(), planned(weights="nf4")
    first, second = segments_of(one), segments_of(other)
    card.fraction = 0.9
    resting = one.estimate.weights + one.estimate.workspace, other.estimate.weights + other.estimate.workspace
    outer, inner = first.within("shape", promised=True), second.within("shape", promised=True)
    outer.__enter__()
    assert limit_of(card) == reserved(one) + reserved(other) - resting[1]
    inner.__enter__()
    assert limit_of(card) == max(reserved(one) + reserved(other) - either for either in resting)
    outer.__exit__(None, None, None)
    assert limit_of(card) == reserved(one) + reserved(other) - resting[0]
    inner.__exit__(None, None, None)
    assert card.fraction == 0.9


def test_a_closed_model_counts_no_more(card: Card) -> None:
    plan = planned()
    first, second = segments_of(plan), segments_of(plan)
    first.close()
    with second.within("shape", promised=True):
        assert limit_of(card) == reserved(plan)


def test_a_lower_limit_of_the_caller_stays_and_comes_back_after_an_error(card: Card) -> None:
    card.fraction = 0.01

    def fail() -> None:
        with segments_of(planned()).within("shape", promised=True):
            assert card.fraction == 0.01
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert card.fraction == 0.01


@pytest.mark.gpu
def test_a_generation_takes_no_more_than_its_limit(demo: Path) -> None:
    with qv.load(demo, vram="8GiB", prompt_len=256, max_new_tokens=16, progress=False) as llm:
        torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # the caller's own workspace
        llm.chat("Say one word.", max_new_tokens=4)
        assert llm.report().measured["peak_allocated"] <= 1.01 * llm.plan.estimate.peak_allocated
        promised = llm.plan.estimate.process_total - llm.plan.estimate.beside_torch
        assert torch.cuda.memory_reserved() <= promised + 2**26
        assert torch.cuda.get_per_process_memory_fraction() == 1.0
