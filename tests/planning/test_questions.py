"""The inverse questions and the reproducible plan, by arithmetic alone."""

import json
from dataclasses import fields, replace

import pytest

import qwen_vram as qv
from qwen_vram.planning.search.offload_tiers import most

SEVEN = "Qwen2.5-7B-Instruct"
RAM = {"ram": "64GiB"}
WIDE_CACHE = {
    "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32_000, "max_position_embeddings": 8_192,
}  # fmt: skip


def test_a_padded_batch_is_planned_with_its_mask():
    work = {"prompt_len": 12_000, "batch_size": 4, "padded": True}
    even, padded = (qv.plan(SEVEN, vram="80GiB", **RAM, **{**work, "padded": one}) for one in (False, True))
    assert padded.workload.padded
    alone = replace(padded.estimate, covered=())
    assert alone == qv.estimate_vram(SEVEN, padded.profile, **work)
    assert padded.estimate.needed_bytes > even.estimate.needed_bytes
    assert "batch 4, padded\n" in str(padded)
    assert "batch_size=4, padded=True, " in padded.call
    assert qv.Plan.from_dict(json.loads(json.dumps(padded.to_dict()))) == padded
    knobs = {"profile": padded.profile}
    smallest = qv.min_vram(SEVEN, **work, **knobs)
    assert smallest == padded.estimate.needed_bytes > qv.min_vram(SEVEN, **{**work, "padded": False}, **knobs)
    assert qv.max_batch(SEVEN, smallest, **RAM, prompt_len=12_000, padded=True, **knobs) == 4
    longest, even = (qv.max_context(SEVEN, smallest, **RAM, batch_size=4, padded=p, **knobs) for p in (True, False))
    assert 12_000 < longest < even
    with pytest.raises(qv.DoesNotFitError) as refused:
        qv.plan(SEVEN, vram=smallest - 1, **RAM, **work, **knobs)
    assert refused.value.nearest.padded


@pytest.mark.parametrize(
    ("vram", "knobs"),
    [("6GiB", {}), ("5GiB", {"kv_cache": "bf16"}), ("7GiB", {"profile": "int4-flash"}), ("18GiB", {"weights": "bf16"})],
    ids=str,
)
def test_the_longest_context_fits_and_one_token_more_does_not(vram, knobs):
    longest = qv.max_context(SEVEN, vram, **RAM, max_new_tokens=64, **knobs)
    assert 64 < longest <= 32_768
    profile = qv.plan(SEVEN, vram=vram, **RAM, prompt_len=longest - 64, max_new_tokens=64, **knobs).profile
    assert profile.kv_cache == knobs.get("kv_cache", profile.kv_cache)
    if longest < 32_768:
        with pytest.raises(qv.DoesNotFitError):
            qv.plan(SEVEN, vram=vram, **RAM, prompt_len=longest - 63, max_new_tokens=64, **knobs)


def test_the_largest_batch_fits_and_one_sequence_more_does_not():
    batch = qv.max_batch(SEVEN, "8GiB", **RAM, profile="compact", prompt_len=2_000)
    assert batch > 1
    qv.plan(SEVEN, vram="8GiB", **RAM, profile="compact", prompt_len=2_000, batch_size=batch)
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(SEVEN, vram="8GiB", **RAM, profile="compact", prompt_len=2_000, batch_size=batch + 1)


@pytest.mark.parametrize("prompt_len", [512, 32_000])
def test_the_smallest_card_holds_the_plan_and_one_byte_less_does_not(prompt_len):
    smallest = qv.min_vram(SEVEN, prompt_len=prompt_len)
    assert qv.plan(SEVEN, vram=smallest, **RAM, prompt_len=prompt_len).estimate.needed_bytes == smallest
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.plan(SEVEN, vram=smallest - 1, **RAM, prompt_len=prompt_len)
    assert caught.value.needed_bytes == smallest


def test_the_most_requests_at_once_fit_and_one_more_does_not():
    work = {"prompt_len": 2_000, "max_new_tokens": 500, "profile": "compact"}
    most_requests = qv.max_concurrency(SEVEN, "8GiB", **RAM, **work)
    assert most_requests > 1
    chosen = qv.plan(SEVEN, vram="8GiB", **RAM, **work, concurrency=most_requests)
    assert chosen.concurrency == chosen.to_dict()["concurrency"] == most_requests
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(SEVEN, vram="8GiB", **RAM, **work, concurrency=most_requests + 1)
    longest = qv.max_context(SEVEN, "8GiB", **RAM, max_new_tokens=500, profile="compact", concurrency=most_requests)
    assert 2_500 <= longest < qv.max_context(SEVEN, "8GiB", **RAM, max_new_tokens=500, profile="compact")
    smallest = qv.min_vram(SEVEN, **work, concurrency=most_requests)
    assert smallest == chosen.estimate.needed_bytes
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(SEVEN, vram=smallest - 1, **RAM, **work, concurrency=most_requests)
    with pytest.raises(qv.WorkloadError, match="concurrency 2 and batch_size 3 are both given"):
        qv.max_context(SEVEN, "8GiB", **RAM, batch_size=3, concurrency=2)


@pytest.mark.parametrize("knobs", [{}, {"weights": "int8-wo"}, {"profile": "compact"}], ids=str)
@pytest.mark.parametrize("vram", ["16GiB", None])
def test_the_call_of_a_plan_for_requests_at_once_plans_the_same(knobs, vram):
    where = {"vram": {} if vram is None else vram, **RAM}
    chosen = qv.plan(SEVEN, **where, **knobs, prompt_len=1_000, concurrency=4)
    assert ", concurrency=4" in chosen.call
    assert "batch_size" not in chosen.call
    assert chosen.notes[0] == "4 requests at once"
    assert "\n  4 requests at once\n" in str(chosen)

    def load(model, device=None, **arguments):
        return qv.plan(model, **{**arguments, **where})

    again = eval(chosen.call, {"qv": type("qv", (), {"load": staticmethod(load)})})
    assert {**vars_of(again.profile), "name": ""} == {**vars_of(chosen.profile), "name": ""}
    assert again.workload == chosen.workload


def test_nothing_fits_on_a_card_that_is_too_small():
    assert qv.max_context(SEVEN, "1.2GiB", **RAM) == 0
    assert qv.max_batch(SEVEN, "1.2GiB", **RAM) == 0


def test_positions_bound_the_context():
    assert qv.max_context("Qwen2.5-0.5B", "80GiB", **RAM) == 32_768
    with pytest.raises(qv.WorkloadError, match="past the model's max_position_embeddings 32768"):
        qv.max_context("Qwen2.5-0.5B", "80GiB", max_new_tokens=32_768)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 10])
def test_most(limit):
    for true in range(limit + 1):
        assert most(limit, true.__ge__) == true


def test_a_plan_comes_back_from_json():
    chosen = qv.plan(SEVEN, vram="5GiB", **RAM, prompt_len=32_000)
    again = qv.Plan.from_dict(json.loads(json.dumps(chosen.to_dict())))
    assert again == chosen
    assert str(again) == str(chosen)


def test_a_plan_of_a_folder_with_an_adapter_comes_back(untied, adapter):
    chosen = qv.plan(untied, vram={}, adapter=adapter)
    again = qv.Plan.from_dict(json.loads(json.dumps(chosen.to_dict())))
    assert again == chosen
    assert again.model == str(untied)


def test_what_is_no_plan_is_refused():
    with pytest.raises(
        qv.ConfigError, match=r"this is no plan \(KeyError: 'architecture'\); pass what Plan.to_dict\(\)"
    ):
        qv.Plan.from_dict({})
    data = qv.plan(SEVEN, vram="8GiB", **RAM).to_dict()
    with pytest.raises(qv.ConfigError, match="this is no plan"):
        qv.Plan.from_dict({**data, "budget": {"vram": 1}})


def test_the_call_that_a_plan_ends_with_plans_the_same():
    chosen = qv.plan(SEVEN, vram="5GiB", **RAM, prompt_len=32_000)
    assert str(chosen).splitlines()[-1] == chosen.call

    def load(model, **kwargs):
        return qv.plan(model, **kwargs, **RAM)

    again = eval(chosen.call, {"qv": type("qv", (), {"load": staticmethod(load)})})
    assert again.estimate.needed_bytes == chosen.estimate.needed_bytes
    assert {**vars_of(again.profile), "name": ""} == {**vars_of(chosen.profile), "name": ""}


def vars_of(profile):
    return {field.name: getattr(profile, field.name) for field in fields(profile)}


def test_every_step_says_what_its_token_takes_at_least():
    *others, last = qv.plan(SEVEN, vram="4.55GiB", **RAM, prompt_len=32_000).steps
    floors = [step.decode_floor_ms for step in others if "kv_cache='bf16'" not in step.change]  # nor is it less then
    assert floors == sorted(floors, reverse=True)
    # The last one brings 32,512 tokens x 57,344 bytes over the link, at 55.2 GB/s.
    assert last.change == "kv_cache='bf16', kv_device='host'"
    assert last.decode_floor_ms == pytest.approx(32_512 * 57_344 / 55.2e9 * 1e3)


def test_the_cache_is_quantized_only_where_the_caller_left_it_open():
    assert qv.plan(SEVEN, vram="6GiB", **RAM, prompt_len=32_000).profile.kv_cache == "int8"
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(SEVEN, vram="6GiB", **RAM, prompt_len=32_000, kv_device="device", kv_cache="bf16", streamed_layers=0)
    kept = qv.plan(SEVEN, vram="6GiB", **RAM, prompt_len=32_000, kv_cache="bf16")
    assert (kept.profile.kv_cache, kept.profile.kv_device) == ("bf16", "host")
    grown = qv.plan(SEVEN, vram="80GiB", **RAM, cache="dynamic")
    assert grown.profile.cache == "dynamic"
    # A growing cache is followed token by token in every layer, so the model of this refusal has few layers.
    long = {"vram": "980MiB", **RAM, "prompt_len": 4_000, "max_new_tokens": 32, "streamed_layers": 0}
    assert qv.plan(WIDE_CACHE, **long).profile.cache == "preallocated"
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(WIDE_CACHE, **long, cache="dynamic")


def test_where_the_host_is_short_the_longest_context_is_of_another_profile():
    """The profile that needs the least of the GPU keeps the cache on the host, which holds less of it here."""
    small = {"vram": "6GiB", "ram": "1.5GiB", "disk_layers": 0}
    longest = qv.max_context("Qwen2.5-7B", **small, max_new_tokens=64)
    assert qv.plan("Qwen2.5-7B", **small, prompt_len=longest - 64, max_new_tokens=64).profile.kv_device == "device"
    with pytest.raises(qv.DoesNotFitError) as refusal:
        qv.plan("Qwen2.5-7B", **small, prompt_len=longest - 63, max_new_tokens=64)
    assert refusal.value.nearest.prompt_len == longest - 64


@pytest.mark.parametrize(
    ("model", "budget", "work"),
    [
        # A quantized head takes a buffer for 16 rows, so that the smallest profile has a whole one.
        (
            "Qwen3-14B",
            {"vram": 5_452_102_515, "ram": "64GiB"},
            {"prompt_len": 32_000, "max_new_tokens": 1, "batch_size": 16},
        ),
        # Plain layers from the disk, for quantized ones do not fit the host.
        ("Qwen3-14B", {"vram": {}, "ram": 6_507_163_965}, {"prompt_len": 32_000, "max_new_tokens": 2}),
    ],
    ids=["gpu", "cpu"],
)
def test_what_a_refusal_offers_fits_and_one_token_more_does_not(model, budget, work):
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.plan(model, **budget, **work)
    offered = caught.value.nearest
    assert (offered.max_new_tokens, offered.batch_size) == (work["max_new_tokens"], work.get("batch_size", 1))
    assert qv.plan(model, **budget, **{**work, "prompt_len": offered.prompt_len}).workload == offered
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(model, **budget, **{**work, "prompt_len": offered.prompt_len + 1})
    longest = qv.max_context(model, **budget, **{knob: count for knob, count in work.items() if knob != "prompt_len"})
    assert longest == offered.context_len


@pytest.mark.parametrize(
    "case",
    [
        {"model": SEVEN, "profile": "compact", "prompt_len": 8_000},
        # Half of it are fragments, which torch gives back: the search has something to find.
        {"model": "Qwen2.5-0.5B", "prompt_len": 10_149, "attention": "eager", "prefill_chunk_size": 512},
    ],
    ids=["whole", "fragments"],
)
def test_whether_a_limit_holds_is_known_as_if_the_need_were(case):
    known = qv.estimate_vram(**case)
    need, most = known.needed_bytes, known.process_total
    for limit in (0, need // 2, need - 2**24, need - 1, need, need + 1, (need + most) // 2, most):
        fresh = qv.estimate_vram(**case)
        assert fresh.needs_at_most(limit) is (need <= limit)
        assert "needed_bytes" not in vars(fresh)


@pytest.mark.parametrize("knobs", [{}, {"attention": "eager", "prefill_chunk_size": 512}], ids=["whole", "fragments"])
def test_whether_a_limit_holds_is_known_for_a_session_too(knobs):
    known = qv.plan("Qwen2.5-0.5B", vram="80GiB", **RAM, profile="default", prompt_len=10_149, **knobs).estimate
    need, most = known.needed_bytes, known.process_total
    assert known.is_of_session
    near = (need - 2**25, need - 2**24, need - 1, need, need + 1, need + 2**24)
    for limit in (0, need // 2, *near, (need + most) // 2, most):
        fresh = replace(known, covered=tuple(map(replace, known.covered)))
        assert fresh.needs_at_most(limit) is (need <= limit)
        assert "needed_bytes" not in vars(fresh)
