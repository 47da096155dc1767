"""Plans and placements, by arithmetic alone."""

import json
import re
import sys
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.timing.generation import generation_ms
from qwen_vram.planning.capacity import available_memory as devices
from qwen_vram.planning.capacity import budget as budget_module
from qwen_vram.planning.capacity.available_memory import DeviceMemory, available_ram
from qwen_vram.planning.placement import place
from qwen_vram.planning.search import decode_graph
from qwen_vram.planning.search.search import Search
from qwen_vram.spec.machine import DEFAULT
from qwen_vram.spec.residency import spread
from qwen_vram.spec.rules.table import CAPTURED, COMPILED

SEVEN = "Qwen/Qwen2.5-7B-Instruct"
RAM = {"ram": "64GiB"}


def plan(vram, **kwargs):
    return qv.plan(SEVEN, vram=vram, **RAM, **kwargs)


def searched(chosen):
    """The steps that the search went down, without what it gave back of speed after that."""
    return [step for step in chosen.steps if step.saved_bytes >= 0]


def test_a_large_card_loses_nothing():
    chosen = plan("80GiB")
    assert (chosen.profile.weights, chosen.profile.embeddings, chosen.profile.prefill_chunk_size) == (
        "bf16",
        "device",
        None,
    )
    assert [step.change for step in chosen.steps[1:]] == ["captured=True"]


def test_what_costs_nothing_comes_before_precision():
    changes = [step.change for step in searched(plan("8GiB", prompt_len=32_000))]
    assert changes[1:] == [
        "prefill_chunk_size=4096",
        "prefill_chunk_size=2048",
        "prefill_chunk_size=1024",
        "embeddings='host'",
        "prefill_chunk_size=512",
        "kv_cache='int8', captured=True",
        "kv_cache='bf16', captured=False, weights='int8-wo'",
        "kv_cache='int8', captured=True",
        "kv_cache='bf16', captured=False, weights='nf4', dequantization='tiled'",
    ]


def precision(chosen):
    return chosen.profile.weights, chosen.profile.lm_head, chosen.profile.kv_cache


def test_keys_and_values_in_int8_come_before_weights_of_less_precision():
    def on(vram, prompt_len, **knobs):
        return precision(qv.plan("Qwen2.5-7B", vram=vram, prompt_len=prompt_len, **RAM, **knobs))

    assert on("16GiB", 40_000) == ("bf16", None, "int8")
    assert on("12GiB", 100_000) == ("int8-wo", None, "int8")
    assert on("8GiB", 60_000) == ("nf4", None, "int8")
    # Without captured steps, a quantized cache is slow, and comes last.
    assert on("16GiB", 40_000, captured=False) == ("int8-wo", None, "bf16")
    assert on("16GiB", 40_000, kv_cache="bf16") == ("int8-wo", None, "bf16")
    assert on({0: "9GiB", 1: "9GiB"}, 60_000)[2] == "bf16"


@pytest.mark.parametrize("prompt_len", [11_000, 12_000, 20_000, 30_000])
def test_a_change_without_a_loss_makes_room_for_captured_steps(prompt_len):
    chosen = plan("16GiB", prompt_len=prompt_len)
    assert precision(chosen) == ("bf16", None, "bf16")
    assert chosen.profile.captured
    assert chosen.times.ms_per_token < 5


def test_keys_and_values_in_int8_make_room_for_captured_steps():
    chosen = plan("6GiB", prompt_len=16_000)
    assert (precision(chosen), chosen.profile.captured) == (("nf4", None, "int8"), True)
    kept = plan("6GiB", prompt_len=16_000, kv_cache="bf16")
    assert (precision(kept), kept.profile.captured) == (("nf4", None, "bf16"), False)
    assert chosen.times.ms_per_token < kept.times.ms_per_token / 5


@pytest.mark.parametrize("vram", ["24GiB", "20GiB", "16GiB", "14GiB", "12GiB", "10GiB", "8GiB", "7GiB"])
@pytest.mark.parametrize("prompt_len", [512, 8_000])
def test_a_plan_stays_within_its_budget_and_takes_the_first_step_that_does(vram, prompt_len):
    chosen = plan(vram, prompt_len=prompt_len)
    assert chosen.estimate.fits(vram)
    assert chosen.steps[-1].needed_bytes == chosen.estimate.needed_bytes
    steps = searched(chosen)
    assert all(step.needed_bytes > chosen.budget.vram for step in steps[:-1])
    assert all(step.needed_bytes <= chosen.budget.vram for step in chosen.steps[len(steps) - 1 :])
    for before, after in zip(chosen.steps, chosen.steps[1:]):
        assert before.needed_bytes - after.needed_bytes == after.saved_bytes != 0


@pytest.mark.parametrize(
    ("vram", "given_back"),
    [
        ("24GiB", ["captured=True"]),
        ("12GiB", ["captured=True", "embeddings='device'", "prefill_chunk_size=None"]),
        ("8GiB", ["captured=True", "embeddings='device'", "dequantization=None", "prefill_chunk_size=None"]),
        ("6GiB", ["captured=True", "dequantization=None", "prefill_chunk_size=None"]),
        ("5GiB", ["captured=True", "dequantization=None", "prefill_chunk_size=None"]),
        ("4GiB", ["captured=True"]),
    ],
)
def test_room_that_is_left_is_given_back_as_speed(vram, given_back):
    chosen = plan(vram, prompt_len=2_048, max_new_tokens=256)
    assert [step.change for step in chosen.steps[len(searched(chosen)) :]] == given_back
    assert chosen.estimate.fits(vram)
    again = qv.Plan.from_dict(chosen.to_dict())
    assert (again.profile, again.estimate.needed_bytes) == (chosen.profile, chosen.estimate.needed_bytes)


def test_what_is_given_back_fits_step_by_step_and_stays_where_it_does_not():
    chosen = plan("5.33GiB", prompt_len=2_048, max_new_tokens=256)
    changes = [step.change for step in chosen.steps[len(searched(chosen)) :]]
    assert changes == ["captured=True"]
    assert plan("5.23GiB", prompt_len=2_048, max_new_tokens=256).profile.captured is False


@pytest.mark.parametrize(
    "knobs", [{"captured": False}, {"embeddings": "host"}, {"prefill_chunk_size": 512}, {"dequantization": "tiled"}]
)
def test_what_the_caller_set_is_not_given_back(knobs):
    profile = plan("8GiB", prompt_len=2_048, max_new_tokens=256, **knobs).profile
    assert all(getattr(profile, knob) == value for knob, value in knobs.items())


@pytest.mark.parametrize(
    "knobs",
    [
        {"weights": "int8"},
        {"kv_cache": "int8", "kernels": "plain"},
        {"kv_device": "host"},
        {"cache": "dynamic"},
        {"attention": "sdpa"},
        {"streamed_layers": 3, "host_layers": 1},
        {"weights": "fp32", "attention": "sdpa"},
        {"profile": "int4-flash"},
        {"prefer": "memory"},
        {"vram": {}},
        {"vram": {0: "40GiB", 1: "40GiB"}},
    ],
    ids=str,
)
def test_steps_that_cannot_be_captured_are_not(knobs):
    asked = {"vram": "80GiB", "prompt_len": 2_048, **RAM, **knobs}
    assert qv.plan(SEVEN, **asked).profile.captured is False


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_steps_over_a_quantized_cache_are_captured(kv_cache):
    chosen = plan("8GiB", prompt_len=30_000, kv_cache=kv_cache, weights="nf4")
    assert chosen.profile.captured
    plain = plan("8GiB", prompt_len=30_000, kv_cache=kv_cache, weights="nf4", captured=False)
    assert chosen.times.ms_per_token < plain.times.ms_per_token / 5


def test_context_and_batch_are_never_shortened():
    chosen = plan("8GiB", prompt_len=16_000, batch_size=2)
    assert (chosen.workload.prompt_len, chosen.workload.batch_size) == (16_000, 2)


def test_what_the_caller_set_is_not_touched():
    chosen = plan("8GiB", weights="nf4", embeddings="device", prefill_chunk_size=777, prompt_len=8_000)
    assert chosen.profile.prefill_chunk_size == 777
    assert chosen.profile.embeddings == "device"


def test_a_profile_that_was_asked_for_is_not_searched():
    with pytest.raises(qv.DoesNotFitError, match="with bf16 weights"):
        plan("8GiB", profile="default")
    assert plan("80GiB", profile="default").profile == qv.PROFILES["default"]


def test_layers_are_streamed_where_nothing_else_fits_and_as_few_as_do():
    chosen = plan("4.02GiB", prompt_len=512, captured=False)
    assert (chosen.profile.weights, chosen.profile.kv_cache, chosen.profile.kv_device) == ("nf4", "bf16", "device")
    layers = chosen.profile.streamed_layers
    assert 2 < layers < 28
    assert chosen.steps[-1].change == f"streamed_layers={layers}, kv_cache='bf16'"
    with pytest.raises(qv.DoesNotFitError):
        plan("4.02GiB", prompt_len=512, profile=chosen.profile.replace(streamed_layers=layers - 1))
    assert list(chosen.device_map.values()).count("cpu") == layers + 1
    for prefer in ("speed", "memory"):
        assert plan("8GiB", prefer=prefer).profile.streamed_layers == 0
    with pytest.raises(qv.DoesNotFitError):
        plan("4.02GiB", streamed_layers=0)


def test_a_long_cache_goes_to_the_host_before_layers_that_leave_it_no_room():
    chosen = plan("3GiB", prompt_len=32_000).profile
    assert (chosen.kv_cache, chosen.kv_device) == ("bf16", "host")
    assert 0 < chosen.streamed_layers < 28


def test_preferences_pick_among_what_fits():
    small, fast = plan("80GiB", prefer="memory"), plan("80GiB", prefer="speed")
    assert small.profile.lm_head == "nf4"
    assert small.estimate.needed_bytes < plan("80GiB").estimate.needed_bytes
    assert fast.profile.weights == "nf4"


def took(chosen):
    """Predicted milliseconds of a plan's generation."""
    return generation_ms(chosen.estimate.architecture, chosen.profile, chosen.workload, chosen.estimate.machine)


@pytest.mark.parametrize("vram", ["24GiB", "16GiB", "12GiB", "8GiB", "6GiB", "5GiB"])
def test_for_speed_no_plan_that_fits_is_predicted_to_be_quicker(vram):
    asked = {"prompt_len": 2_048, "max_new_tokens": 256}
    fast, least_lossy = plan(vram, prefer="speed", **asked), plan(vram, **asked)
    assert fast.estimate.fits(vram)
    assert took(fast) <= took(least_lossy)
    assert fast.profile.captured
    search = Search(
        "", fast.estimate.architecture, fast.workload, fast.budget, "auto", {}, machine=fast.estimate.machine
    )
    quickened = [search._quickened(candidate) for candidate in search.find("speed")]
    assert took(fast) == min(took(plan(vram, profile=one.estimate.profile, **asked)) for one in quickened)


def test_for_speed_a_cpu_takes_the_quickest_by_its_rates():
    asked = {"vram": {}, "ram": "16GiB", "prompt_len": 64}
    chosen = {prefer: qv.plan("Qwen2.5-0.5B", prefer=prefer, **asked) for prefer in ("quality", "speed")}
    quality, fast = (chosen[prefer].times for prefer in ("quality", "speed"))
    assert fast.first_token_ms + 511 * fast.ms_per_token < quality.first_token_ms + 511 * quality.ms_per_token


def test_a_move_that_is_slower_by_the_rates_is_not_taken(monkeypatch):
    # A host that launches in no time leaves steps to the kernels, which are faster where matrices are tiled.
    quick = DEFAULT._replace(layer_launch_time=1_000)
    given_back = {}
    for machine in (DEFAULT, quick):
        monkeypatch.setattr("qwen_vram.planning.planner.current", lambda machine=machine: machine)
        chosen = plan("8GiB", prompt_len=2_048, max_new_tokens=256, captured=False)
        given_back[machine] = [step.change for step in chosen.steps[len(searched(chosen)) :]]
    assert given_back[DEFAULT] == ["embeddings='device'", "dequantization=None", "prefill_chunk_size=None"]
    assert given_back[quick] == ["embeddings='device'", "prefill_chunk_size=None"]


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"weights": "nf4", "streamed_layers": 4, "host_layers": 1}, "1 layer computes on the CPU"),
        ({"weights": "nf4", "streamed_layers": 4, "host_layers": 3}, "3 layers compute on the CPU"),
        ({"kv_cache": "int4", "kernels": "plain"}, "keys and values are in int4, and kernels='plain'"),
        ({"kv_device": "host"}, "keys and values are on the host"),
        ({"vram": {0: "20GiB", 1: "20GiB"}}, "layers are on 2 GPUs"),
        ({"weights": "int8"}, "products with int8 matrices are not captured"),
        ({"cache": "dynamic"}, "cache='dynamic', attention='fused'"),
        ({"captured": False}, "captured=False, or the graph does not fit"),
        ({"vram": "5.23GiB"}, "captured=False, or the graph does not fit"),
    ],
    ids=str,
)
def test_a_plan_says_why_steps_are_not_captured_and_what_that_costs(knobs, reason):
    chosen = qv.plan(SEVEN, **{"vram": "80GiB", **RAM, "prompt_len": 2_048, "max_new_tokens": 256, **knobs})
    assert chosen.not_captured == json.loads(json.dumps(chosen.to_dict()))["not_captured"] == reason
    said = re.search(r"\n  decode steps are launched one by one \((.*)\): (\d+) ms a token, not (\d+)\n", str(chosen))
    assert said[1] == reason
    least = 2 if "host_layers" in knobs else 4
    assert int(said[2]) == round(chosen.times.ms_per_token) > least * int(said[3])
    assert qv.Plan.from_dict(chosen.to_dict()).not_captured == reason


def test_each_knob_of_captured_steps_has_a_reason():
    assert set(decode_graph._REASONS) == set(CAPTURED)


@pytest.mark.parametrize("knobs", [{}, {"profile": "speed"}, {"vram": {}}], ids=str)
def test_a_plan_says_nothing_of_steps_that_are_captured_or_on_a_cpu(knobs):
    chosen = qv.plan(SEVEN, **{"vram": "80GiB", **RAM, **knobs})
    assert chosen.not_captured is chosen.to_dict()["not_captured"] is None
    assert "one by one" not in str(chosen)


def test_a_tied_model_keeps_its_table_until_its_head_is_a_copy():
    chosen = qv.plan("Qwen2.5-3B", vram="3.6GiB", **RAM)
    assert chosen.profile.embeddings == "device"
    assert chosen.profile.lm_head is None
    assert set(chosen.device_map.values()) == {0}
    chosen = qv.plan("Qwen2.5-3B", vram="2.5GiB", **RAM)
    assert searched(chosen)[-1].change == "lm_head='nf4', embeddings='host'"
    assert [name for name, where in chosen.device_map.items() if where == "cpu"] == ["model.embed_tokens"]
    head = qv.plan("Qwen2.5-3B", vram="2.5GiB", embeddings="host", **RAM)
    assert searched(head)[-1].change == "lm_head='nf4'"
    assert head.estimate.parts() == chosen.estimate.parts()
    for knobs in ({"embeddings": "device"}, {"lm_head": None}):
        steps = qv.plan("Qwen2.5-3B", vram="2.5GiB", **RAM, **knobs).steps
        assert not any("lm_head" in step.change or "embeddings" in step.change for step in steps)


def test_a_map_of_a_tied_model_lets_the_table_go_with_a_head_of_its_own():
    knobs = {"profile": "int4-flash", "vram": "2.5GiB", **RAM}
    shared, own = qv.offload_map("Qwen2.5-3B", **knobs), qv.offload_map("Qwen2.5-3B", lm_head="nf4", **knobs)
    assert shared["model.embed_tokens"] == 0
    assert any(where == "cpu" for where in shared.values())
    assert [name for name, where in own.items() if where == "cpu"] == ["model.embed_tokens"]


def test_without_a_gpu_the_plan_is_for_the_host():
    chosen = qv.plan(SEVEN, vram={}, **RAM)
    assert chosen.on_cpu
    assert set(chosen.device_map.values()) == {"cpu"}
    assert "fits in 64.00 GiB of the host" in str(chosen)


def test_a_dict_of_one_device_is_a_budget():
    assert plan({0: "8GiB"}).budget.vram == 8 * 2**30


def test_no_budget_is_what_is_free_now(monkeypatch):
    card = DeviceMemory("a card", 24 * 2**30, free=10 * 2**30, used_here=2**30)
    monkeypatch.setattr(devices, "visible_gpus", lambda: [card])
    assert qv.plan(SEVEN, **RAM).budget.vram == 11 * 2**30 - budget_module.FREE_RESERVE


def test_available_ram_is_no_more_than_there_is():
    assert 2**28 < available_ram() < 2**44


def test_available_ram_without_psutil_is_the_systems_own_figure(monkeypatch):
    with_it = available_ram()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert available_ram() == pytest.approx(with_it, rel=0.2)


def test_a_machine_that_does_not_tell_its_memory_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(devices, "Path", lambda path: Path("/nowhere"))
    with pytest.raises(qv.BackendUnavailableError, match="cannot tell how much host memory is free; pass ram='16GiB'"):
        qv.plan(SEVEN, vram="8GiB")


def test_a_plan_is_plain_data_and_a_text():
    chosen = plan("8GiB", prompt_len=8_000)
    data = json.loads(json.dumps(chosen.to_dict()))
    assert data["profile"]["weights"] == "int8" or data["profile"]["weights"] == "nf4"
    assert data["steps"][0]["change"].startswith("bf16 weights")
    assert "fits in 8.00 GiB of the GPU" in str(chosen)


# offload_map


@pytest.mark.parametrize("ram", ["64", -1, "64 GX"])
def test_a_map_of_any_budget_still_reads_the_hosts(ram):
    with pytest.raises(qv.UnitError, match="ram"):
        qv.offload_map(SEVEN, layers_on_cpu=3, ram=ram)
    assert qv.offload_map(SEVEN, layers_on_cpu=3, ram="64GiB") == qv.offload_map(SEVEN, layers_on_cpu=3)


def test_the_articles_third_row():
    where = qv.offload_map(SEVEN, layers_on_cpu=3)
    assert [name for name, device in where.items() if device == "cpu"] == [f"model.layers.{n}" for n in (8, 17, 27)]


def test_the_table_goes_first_and_then_layers():
    ample, tight = (qv.offload_map(SEVEN, vram=vram, **RAM) for vram in ("15GiB", "10GiB"))
    assert [name for name, where in ample.items() if where == "cpu"] == ["model.embed_tokens"]
    on_host = [name for name, where in tight.items() if where == "cpu"]
    assert on_host[0] == "model.embed_tokens"
    assert 5 < len(on_host) < 20


def test_a_card_that_holds_everything_keeps_everything():
    assert set(qv.offload_map(SEVEN, vram="24GiB", **RAM).values()) == {0}


@pytest.mark.parametrize("vram", ["14GiB", "10GiB", "7GiB", "5GiB"])
def test_a_map_leaves_room_and_takes_no_layer_too_many(vram):
    where = qv.offload_map(SEVEN, vram=vram, prompt_len=2_000, **RAM)
    streamed = sum(device == "cpu" for name, device in where.items() if "layers" in name)

    def needs(layers):
        knobs = {"embeddings": "host", "streamed_layers": layers, "prompt_len": 2_000}
        return qv.estimate_vram(SEVEN, **knobs)

    assert needs(streamed).fits(vram)
    assert not needs(streamed - 1).fits(vram)


def test_streamed_layers_are_spread_evenly():
    for layers in (24, 28, 36):
        for count in range(1, layers + 1):
            chosen = sorted(spread(count, layers))
            assert len(chosen) == count
            gaps = [b - a for a, b in zip([-1, *chosen], chosen)]
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.torch
@pytest.mark.parametrize("name", ["untied", "tied", "qwen3"])
def test_a_map_names_the_modules_that_the_model_has(request, name):
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    where = qv.offload_map(folder, layers_on_cpu=1)
    parameters = [parameter for parameter, _ in model.named_parameters()]
    for module in where:
        model.get_submodule(module)
    assert all(any(parameter.startswith(module + ".") for module in where) for parameter in parameters)


def test_accelerate_takes_the_map(untied):
    from accelerate import dispatch_model
    from transformers import AutoModelForCausalLM

    where = {name: "cpu" for name in qv.offload_map(untied, layers_on_cpu=1)}
    dispatch_model(AutoModelForCausalLM.from_pretrained(untied), where, force_hooks=True)


def test_a_host_embedding_is_in_the_placement():
    architecture = qv.Architecture.from_config({**qv.CATALOG[SEVEN].shape._asdict(), "max_position_embeddings": 4096})
    placement = place(architecture, qv.PROFILES["compact"])
    assert placement.device_map["model.embed_tokens"] == "cpu"
    assert placement.device_map["lm_head"] == 0


def test_a_compiled_plan_leaves_out_what_a_decode_step_cannot_run_with():
    made = qv.plan("Qwen2.5-7B", vram="8GiB", ram="64GiB", compiled=True, prompt_len=4_000)
    profile = made.profile
    assert (profile.compiled, profile.attention, profile.weights) == (True, "fused", "nf4")
    assert all(getattr(profile, knob) == value for knob, value in COMPILED.items())
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.plan("Qwen2.5-7B", vram="2GiB", ram="64GiB", compiled=True, prompt_len=4_000)
    assert caught.value.estimate.profile.streamed_layers == 0


@pytest.mark.parametrize("weights", ["int4", "int8-wo", "fp8"])
def test_no_plan_streams_what_no_backend_can_move(weights):
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.plan("Qwen2.5-7B", vram="4GiB", ram="64GiB", weights=weights, prompt_len=2_000)
    assert caught.value.estimate.profile.streamed_layers == 0
    assert qv.plan("Qwen2.5-7B", vram="3GiB", ram="64GiB", weights="fp4", prompt_len=2_000).profile.streamed_layers


@pytest.mark.parametrize("vram", [0.9 * 2**33, 8.0, ["8GiB"], b"8GiB"], ids=str)
def test_what_is_no_size_is_refused_and_not_taken_for_no_gpu(vram):
    with pytest.raises(qv.UnitError, match="vram is not a size"):
        qv.plan(SEVEN, vram=vram)
    with pytest.raises(qv.UnitError, match="vram is not a size"):
        qv.max_context(SEVEN, vram)


def test_nothing_is_kept_free_where_a_shell_says_so():
    assert plan("8GiB", reserve="0") == plan("8GiB", reserve=0)


@pytest.mark.parametrize("vram", ["24GiB", "3GiB"])
def test_a_cache_that_is_to_be_on_the_host_is_not_quantized(vram):
    chosen = plan(vram, prompt_len=8_000, kv_device="host").profile
    assert (chosen.kv_cache, chosen.kv_device) == ("bf16", "host")


@pytest.mark.parametrize(
    ("model", "vram", "prompt_len"), [("Qwen2.5-3B", "1.28GiB", 8_000), ("Qwen2.5-14B", "1.79GiB", 1_000)]
)
def test_a_card_that_holds_a_long_prompt_holds_a_short_one(model, vram, prompt_len):
    """All layers streamed leave less than a cache in int4 takes, and more than one on the host does."""
    for length in (prompt_len, 30_000 if model == "Qwen2.5-3B" else 6_000):
        assert qv.plan(model, vram=vram, **RAM, prompt_len=length, max_new_tokens=64).profile.kv_device == "host"


@pytest.mark.parametrize(("vram", "weights"), [("8GiB", "nf4"), ("12GiB", "int8-wo")])
def test_the_table_stays_where_the_host_has_no_room_for_it(vram, weights):
    chosen = qv.plan(SEVEN, vram=vram, ram="1GiB")
    assert (chosen.profile.weights, chosen.profile.embeddings, chosen.estimate.host) == (weights, "device", 0)
    assert qv.max_context(SEVEN, vram, ram="1GiB") > 1_024


def test_weights_follow_a_head_that_was_asked_for():
    for vram in ("80GiB", "8GiB"):
        chosen = plan(vram, lm_head="nf4")
        assert chosen.profile.weights == "nf4"
        assert chosen.steps[0].change == "nf4 weights, fused attention, preallocated cache"
    with pytest.raises(qv.NotSupportedError, match="lm_head='nf4' with weights='int4': .* use lm_head='int4'"):
        plan("80GiB", weights="int4", lm_head="nf4")


def test_a_plan_says_everywhere_why_its_steps_are_not_captured(capsys):
    from qwen_vram.cli.plans import plan as command

    asked = {"prompt_len": 2_048, "max_new_tokens": 256}
    chosen = plan("8GiB", kv_device="host", **asked)
    line = chosen.predicted_lines[1]
    assert line.startswith("decode steps are launched one by one (keys and values are on the host): ")
    assert line in str(chosen)
    assert line in chosen._repr_html_()
    command(SEVEN, vram="8GiB", ram="64GiB", knobs=["kv_device=host"], **asked)
    assert line in capsys.readouterr().out
    for vram in ("8GiB", "4GiB"):
        assert len(plan(vram, **asked).predicted_lines) == 1
