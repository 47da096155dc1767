"""Plans for several requests at once: their refusals, their JSON, and the largest number that fits."""

import json

import pytest

import qwen_vram as qv

SEVEN = "Qwen2.5-7B-Instruct"
RAM = {"ram": "64GiB"}
WORK = {"prompt_len": 1_500, "max_new_tokens": 500}


def test_a_plan_has_its_concurrency_and_comes_back_from_json():
    plan = qv.plan(SEVEN, vram="24GiB", **RAM, **WORK, concurrency=16)
    assert (plan.concurrency, plan.workload.batch_size, plan.profile.cache, plan.profile.captured) == (
        16,
        16,
        "paged",
        True,
    )
    assert (plan.profile.attention, plan.profile.kernels) == ("fused", "fused")
    said = json.loads(json.dumps(plan.to_dict()))
    assert said["concurrency"] == 16
    assert qv.Plan.from_dict(said) == plan
    assert "concurrency=16" in plan.call
    assert "batch_size" not in plan.call
    again = qv.plan(SEVEN, vram="24GiB", **RAM, **WORK, profile=plan.profile, batch_size=16)  # the call's arguments
    assert again.estimate.needed_bytes == plan.estimate.needed_bytes
    assert again.concurrency == 16
    for alone in (
        qv.plan(SEVEN, vram="24GiB", **RAM, **WORK),
        qv.plan(SEVEN, vram="24GiB", **RAM, **WORK, batch_size=4),
    ):
        assert alone.concurrency == alone.to_dict()["concurrency"] == 1
        assert alone.profile.cache != "paged"


@pytest.mark.parametrize(
    ("vram", "knobs"),
    [
        ("24GiB", {"profile": "default"}),
        ("8GiB", {"profile": "compact"}),
        pytest.param("8GiB", {}, marks=pytest.mark.full),
        ("24GiB", {"weights": "int8-wo", "prefill_chunk_size": 512, "profile": "default"}),
    ],
    ids=str,
)
def test_the_most_requests_fit_and_one_more_does_not(vram, knobs):
    most = qv.max_concurrency(SEVEN, vram, **RAM, **WORK, **knobs)
    assert most > 10
    assert qv.plan(SEVEN, vram=vram, **RAM, **WORK, concurrency=most, **knobs).concurrency == most
    with pytest.raises(qv.DoesNotFitError) as refused:
        qv.plan(SEVEN, vram=vram, **RAM, **WORK, concurrency=most + 1, **knobs)
    assert refused.value.needed_bytes > refused.value.budget_bytes
    assert qv.max_concurrency(SEVEN, vram, **RAM, prompt_len=3_000, max_new_tokens=500, **knobs) < most


def test_it_is_0_if_not_one_request_fits_and_at_most_4096():
    assert qv.max_concurrency(SEVEN, "1GiB", **RAM, **WORK) == 0
    assert (
        qv.max_concurrency("Qwen2.5-0.5B", "80GiB", **RAM, prompt_len=1, max_new_tokens=1, profile="default") == 4_096
    )


def test_on_a_cpu_the_budget_is_the_hosts_memory():
    most = qv.max_concurrency(SEVEN, **RAM, **WORK, profile="default")
    plan = qv.plan(SEVEN, **RAM, **WORK, profile="default", concurrency=most)
    assert (plan.concurrency, plan.profile.captured) == (most, False)
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(SEVEN, **RAM, **WORK, profile="default", concurrency=most + 1)


def test_requests_over_pages_need_no_padding():
    plain, padded = (qv.plan(SEVEN, vram="24GiB", **RAM, **WORK, concurrency=8, padded=one) for one in (False, True))
    assert not padded.workload.padded
    assert padded.estimate.needed_bytes == plain.estimate.needed_bytes


@pytest.mark.parametrize("ask", [qv.plan, qv.estimate_vram], ids=["plan", "estimate_vram"])
@pytest.mark.parametrize(
    ("given", "name", "text"),
    [
        ({"concurrency": 0}, "concurrency", "concurrency must be None or a positive whole number of requests, got 0"),
        ({"concurrency": -2}, "concurrency", "positive whole number of requests, got -2"),
        ({"concurrency": True}, "concurrency", "positive whole number of requests, got True"),
        ({"concurrency": 2.0}, "concurrency", r"positive whole number of requests, got 2\.0"),
        (
            {"concurrency": 2, "batch_size": 3},
            "batch_size",
            "concurrency 2 and batch_size 3 are both given; each request is one sequence, so leave batch_size out",
        ),
        (
            {"concurrency": 2, "cache": "static"},
            "cache",
            "concurrency 2 needs cache='paged', got cache='static'; leave cache out",
        ),
        *(
            (
                {"concurrency": 2, knob: value},
                knob,
                rf"concurrent requests \(cache='paged'\) need {knob}={runs!r}, got {knob}={value!r}; change one of the",
            )
            for knob, value, runs in (
                ("kv_cache", "int8", "bf16"),
                ("kv_cache", "int4", "bf16"),
                ("kv_device", "host", "device"),
                ("streamed_layers", 2, 0),
                ("compiled", True, False),
            )
        ),
        ({"concurrency": 2, "profile": "tiny"}, "kv_cache", "need kv_cache='bf16', got kv_cache='int8'"),
    ],
    ids=str,
)
def test_what_pages_exclude_is_refused_by_name(ask, given, name, text):
    budget = {"vram": "24GiB", **RAM} if ask is qv.plan else {}
    with pytest.raises(qv.WorkloadError, match=text) as caught:
        ask(SEVEN, **budget, **WORK, **given)
    assert caught.value.name == name


def test_captured_steps_exclude_what_they_always_exclude():
    for knobs, text in (
        ({"attention": "sdpa"}, "captured=True needs attention='fused'"),
        ({"weights": "int8"}, "captured=True cannot go with 'int8'"),
    ):
        with pytest.raises(qv.WorkloadError, match=text):
            qv.plan(SEVEN, vram="24GiB", **RAM, **WORK, concurrency=2, **knobs)


def test_several_gpus_are_refused():
    cards = {0: "24GiB", 1: "24GiB"}
    for ask in (lambda: qv.plan(SEVEN, vram=cards, concurrency=2), lambda: qv.max_concurrency(SEVEN, cards)):
        with pytest.raises(qv.NotSupportedError, match="over 2 GPUs cannot be loaded yet"):
            ask()


def test_a_plan_on_the_cpu_that_does_not_fit_says_so():
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(SEVEN, ram="3GiB", **WORK, concurrency=2)
    assert qv.max_concurrency(SEVEN, ram="3GiB", **WORK) == 0
