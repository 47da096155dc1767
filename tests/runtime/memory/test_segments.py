"""The limit that torch's allocator gets while a generation runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_vram as qv
from qwen_vram.runtime.memory.beside import Beside
from qwen_vram.runtime.memory.segments import Segments

CARD = 16 * 2**30
DEVICE = torch.device("cuda", 0)
MODEL = "Qwen2.5-0.5B-Instruct"


class Card:
    """torch's calls on a GPU's allocator, which this machine has not: what was set is kept."""

    def __init__(self) -> None:
        self.fraction, self.allocated, self.reserved, self.emptied = 1.0, 0, 0, 0

    def empty(self) -> None:
        self.emptied += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    properties = type("Properties", (), {"total_memory": CARD})()
    calls = {
        "empty_cache": card.empty,
        "get_device_properties": lambda device: properties,
        "get_per_process_memory_fraction": lambda device: card.fraction,
        "set_per_process_memory_fraction": lambda fraction, device: setattr(card, "fraction", fraction),
        "memory_allocated": lambda device: card.allocated,
        "memory_reserved": lambda device: card.reserved,
    }
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call, raising=False)
    monkeypatch.setattr("qwen_vram.runtime.memory.beside.take_workspace", lambda device: None)
    return card


def segments_of(plan: qv.Plan, before: int = 0) -> Segments:
    """The segments of a model that is loaded now, into a process that had `before` bytes allocated."""
    return Segments(plan, [DEVICE], Beside({DEVICE: before}))


def planned(**asked: Any) -> qv.Plan:
    return qv.plan(MODEL, vram="8GiB", **{"prompt_len": 4_000, "max_new_tokens": 64, **asked})


def tight(**knobs: Any) -> qv.Plan:
    """A plan that counts on segments which torch returns before it is out of memory."""
    plan = planned(profile="int4-flash", prompt_len=8_000, batch_size=4, **knobs)
    assert plan.estimate.needed_bytes < plan.estimate.process_total
    return replace(plan, budget=replace(plan.budget, vram=plan.estimate.needed_bytes))


def reserved(plan: qv.Plan) -> int:
    assert plan.budget.vram is not None
    return min(plan.estimate.process_total, plan.budget.vram) - plan.estimate.beside_torch


def limit_of(card: Card) -> int:
    return round(card.fraction * CARD)


def test_a_generation_that_counts_on_returned_segments_is_limited_to_the_promise(card: Card) -> None:
    plan = tight()
    segments = segments_of(plan)
    with segments.within("shape", promised=True):
        assert limit_of(card) == reserved(plan)
    assert card.fraction == 1.0
    with segments.within("other shape", promised=False):
        assert card.fraction == 1.0  # it was held against the budget, and may need more than the plan


def test_a_plan_that_needs_none_of_that_is_not_limited(card: Card) -> None:
    with segments_of(planned()).within("shape", promised=True):
        assert card.fraction == 1.0


def test_segments_go_back_before_another_shape_and_after_more_than_the_promise(card: Card) -> None:
    plan = planned(captured=True)
    # A captured plan's memory for keys and values is the model's own while it rests.
    card.allocated = plan.estimate.weights + plan.estimate.workspace + plan.estimate.kv_cache
    segments = segments_of(plan)
    counts = []
    for shape, taken in (("one", 0), ("one", 0), ("other", 0), ("other", 1), ("other", 0)):
        card.reserved = reserved(plan) + taken
        with segments.within(shape, promised=True):
            pass
        counts.append(card.emptied)
    assert counts == [1, 1, 2, 3, 4]


def test_tensors_of_the_caller_stay_beside_the_promise(card: Card) -> None:
    plan = tight()
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
    one, other = tight(), tight(weights="fp4")
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
    plan = tight()
    first, second = segments_of(plan), segments_of(plan)
    first.close()
    with second.within("shape", promised=True):
        assert limit_of(card) == reserved(plan)


def test_a_lower_limit_of_the_caller_stays_and_comes_back_after_an_error(card: Card) -> None:
    card.fraction = 0.01

    def fail() -> None:
        with segments_of(tight()).within("shape", promised=True):
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
