"""`load(verify=True)`: a plan that holds is handed out, one that does not is refused with the parts that differ."""

from dataclasses import replace

import pytest

import qwen_vram as qv
from qwen_vram.runtime.loading import load as loader
from qwen_vram.runtime.loading.verify import verify


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"cache": "preallocated", "attention": "fused"},
        {"cache": "static", "prefill_chunk_size": 32},
        {"weights": "nf4", "embeddings": "host"},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_a_plan_that_holds(demo, knobs):
    options = {"prompt_len": 100, "max_new_tokens": 20, **knobs}
    with qv.load(demo, profile="default", progress=False, verify=True, **options) as llm:
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
        if knobs.get("cache"):
            # The whole cache was there, though only two tokens were made.
            assert llm.report().measured["kv_cache"] == llm.plan.estimate.kv_cache


def test_a_plan_that_does_not_hold(demo):
    with qv.load(demo, profile="default", progress=False, prompt_len=100, max_new_tokens=20) as llm:
        real = llm.plan.estimate
        llm.plan = replace(llm.plan, estimate=replace(real, weights=real.weights - 5_000_000))
        llm._generations.prediction = lambda: llm.plan.estimate
        with pytest.raises(qv.PlanNotHeldError) as caught:
            verify(llm)
    assert caught.value.parts == {"weights": (real.weights - 5_000_000, real.weights)}
    assert str(caught.value) == (
        "the plan does not hold: weights: 6,020,800 bytes promised, 11,020,800 taken. Pass a smaller vram, and "
        "please report this with the model, the knobs and the versions of torch and transformers"
    )


def test_a_refused_model_is_closed(demo, monkeypatch):
    closed = []

    def refuse(llm):
        closed.append(llm)
        raise qv.PlanNotHeldError("no", parts={})

    monkeypatch.setattr(loader, "check_plan", refuse)
    with pytest.raises(qv.PlanNotHeldError, match="no"):
        qv.load(demo, progress=False, verify=True)
    assert "closed" in repr(closed[0])
