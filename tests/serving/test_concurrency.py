"""The number of requests that a server runs at once: a given one, and the one that `auto` chooses."""

import pytest

import qwen_vram as qv
from qwen_vram.serving import concurrency
from qwen_vram.serving.concurrency import plan_to_serve, wanted

MODEL = "Qwen2.5-7B-Instruct"


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr(concurrency, "missing_compiler", lambda: "")


def test_without_a_compiler_requests_on_a_gpu_run_one_by_one(demo, monkeypatch):
    monkeypatch.setattr(concurrency, "missing_compiler", lambda: "a C compiler")
    served = plan_to_serve(MODEL, "auto", {"vram": "24GiB", **HOST})
    assert (served.concurrency, served.plan.concurrency) == (None, 1)
    assert served.lines[1] == "not several at once: they need Triton and a C compiler, and a C compiler is missing"
    on_host = plan_to_serve(str(demo), "auto", {"prompt_len": 64, "max_new_tokens": 16})
    assert on_host.concurrency == 16 or not on_host.plan.on_cpu


HOST = {"ram": "32GiB", "prompt_len": 2048, "max_new_tokens": 512}


def test_auto_is_sixteen_if_that_costs_no_precision():
    served = plan_to_serve(MODEL, "auto", {"vram": "24GiB", **HOST})
    assert (served.concurrency, served.plan.concurrency, served.reason) == (16, 16, "")
    assert served.lines == ["each of at most 2,560 tokens, prompt and answer together"]
    assert served.plan.notes[0] == "16 requests at once"


@pytest.mark.parametrize(("vram", "why"), [("16GiB", "would be needed instead of bf16 weights"), ("6GiB", "nf4")])
def test_auto_is_the_largest_number_that_costs_no_precision(vram, why):
    served = plan_to_serve(MODEL, "auto", {"vram": vram, **HOST})
    alone = qv.plan(MODEL, vram=vram, **HOST)
    assert 1 < served.concurrency < 16
    assert served.plan.concurrency == served.concurrency
    formats = (alone.profile.weights, alone.profile.head_format)
    assert (served.plan.profile.weights, served.plan.profile.head_format) == formats
    more = qv.plan(MODEL, vram=vram, concurrency=served.concurrency + 1, **HOST)
    assert (more.profile.weights, more.profile.head_format) != formats
    assert served.lines[1].startswith(f"not {served.concurrency + 1} at once: ")
    assert why in served.lines[1]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"vram": "4GiB"}, "needs 4.7"),
        ({"vram": "24GiB", "kv_cache": "int8"}, "need kv_cache='bf16', got kv_cache='int8'"),
        ({"vram": "24GiB", "cache": "static"}, "needs cache='paged', got cache='static'"),
        ({"vram": {0: "20GiB", 1: "20GiB"}}, "over 2 GPUs cannot be loaded yet"),
    ],
)
def test_auto_runs_one_by_one_what_cannot_run_together(arguments, why):
    served = plan_to_serve(MODEL, "auto", {**arguments, **HOST})
    assert served.concurrency is None
    assert served.plan.profile.cache != "paged"
    assert served.lines[0] == "requests run one after the other"
    assert served.lines[1].startswith("not 2 at once: ")
    assert why in served.lines[1]


def test_a_given_number_is_planned_or_refused():
    budget = {"vram": "16GiB", **HOST}
    served = plan_to_serve(MODEL, 40, budget)
    assert (served.concurrency, served.plan.concurrency) == (40, 40)
    one = plan_to_serve(MODEL, 1, budget)
    assert one.concurrency is None
    assert one.plan.profile.cache == "preallocated"
    with pytest.raises(qv.DoesNotFitError):
        plan_to_serve(MODEL, 40, {"vram": "4GiB", **HOST})
    with pytest.raises(qv.WorkloadError, match="need kv_cache='bf16'"):
        plan_to_serve(MODEL, 4, {**budget, "kv_cache": "int8"})


def test_a_wrong_number_is_refused():
    assert [wanted(text) for text in ("auto", "1", "64")] == ["auto", 1, 64]
    for text in ("0", "-1", "1.5", "", "many", "²", "9999999"):
        with pytest.raises(qv.WorkloadError, match="--concurrency must be auto or a positive whole number") as caught:
            wanted(text)
        assert caught.value.got == text
