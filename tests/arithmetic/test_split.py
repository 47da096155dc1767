"""Budgets for several GPUs by arithmetic: slices of a model, the planner's splits, and refusals. And the reserve."""

import itertools
import json

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.gpu_split import split_estimate, split_of
from qwen_vram.arithmetic.pipeline import slices
from qwen_vram.arithmetic.process import _runs_within
from qwen_vram.arithmetic.replay.generation import replay_generation
from qwen_vram.arithmetic.replay.linear import workspaces
from qwen_vram.arithmetic.replay.load import replay_load
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.planning.capacity.fit import fits
from qwen_vram.planning.capacity.gpu_split import _at_least
from qwen_vram.planning.search.search import Search
from qwen_vram.spec.machine import DEFAULT
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload
from tests.helpers.exact_replay import exact_replay
from tests.helpers.tiers import thinned
from tests.planning.test_planning import searched

GIB = 2**30
RAM = {"ram": "64GiB"}
TWO = {0: "20GiB", 1: "20GiB"}
FUSED = {"attention": "fused", "cache": "preallocated"}
KNOBS = [
    {},
    {"weights": "nf4", "lm_head": "nf4"},
    {"weights": "int8", "embeddings": "host", **FUSED},
    {"kv_cache": "int8", **FUSED},
    {"kv_device": "host", "embeddings": "host", **FUSED},
]
MODELS = ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-1.7B", "Qwen3-8B"]


def split(model, layers, work=None, **knobs):
    label, architecture = resolve_model(model)
    workload = Workload(**{"prompt_len": 700, "max_new_tokens": 8, **(work or {})})
    return split_estimate(label, architecture, Profile(**knobs), workload, layers, machine=DEFAULT)


def rest(model, count):
    return resolve_model(model)[1].num_hidden_layers - count


# Slices.


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("devices", [2, 3, 5])
def test_slices_are_the_whole_model_to_the_byte(model, knobs, devices):
    whole = qv.estimate_vram(model, Profile(**knobs), prompt_len=700, max_new_tokens=8)
    counts = {device: 1 + device for device in range(devices - 1)}
    together = split(model, {**counts, 9: rest(model, sum(counts.values()))}, **knobs)
    parts = together.devices.values()
    assert together.weights == sum(part.weights for part in parts) == whole.weights
    assert together.host == whole.host
    if knobs.get("kv_device") == "host":
        # Each device has slots of its own.
        slot = whole.kv_cache // 2
        assert [part.kv_cache for part in parts] == [slot * min(2, count) for count in split_of(together).values()]
    else:
        assert together.kv_cache == sum(part.kv_cache for part in parts) == whole.kv_cache
    names = [weight.name for part in parts for weight in part.architecture.weights()]
    assert sorted(names) == sorted(weight.name for weight in whole.architecture.weights())
    assert sum(part.architecture.num_parameters for part in parts) == whole.architecture.num_parameters


def test_one_slice_is_the_model():
    _, architecture = resolve_model("Qwen2.5-7B")
    assert list(slices(architecture, (28,))) == [architecture]


def test_an_adapter_goes_with_its_modules(untied, adapter):
    _, architecture = resolve_model(untied, adapter)
    first, second = slices(architecture, (1, 2))
    assert {weight.name.split(".")[2] for weight in first.adapter_weights} == {"0"}
    assert {weight.name.split(".")[2] for weight in second.adapter_weights} == {"1", "2"}
    assert len(first.adapter_weights) + len(second.adapter_weights) == len(architecture.adapter_weights)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_each_devices_peak_holds_its_parts(model, knobs):
    for part in split(model, {0: 7, 1: rest(model, 7)}, **knobs).devices.values():
        assert sum(part.parts().values()) == part.peak_allocated
        assert all(size >= 0 for size in part.parts().values())
        beside = part.process_total - part.peak_reserved
        assert part.peak_allocated <= part.peak_reserved
        assert 0 < beside < part.needed_bytes - part.peak_allocated
        assert part.peak_moment in part.moments


RUNS = itertools.product(
    [*KNOBS, {"attention": "eager"}, {"cache": "static"}, {"prefill_chunk_size": 256}],
    [{}, {"batch_size": 4, "padded": True}, {"logits": "all"}],
)


# A plain forward has no cache.
@pytest.mark.parametrize(
    ("knobs", "work"), [run for run in RUNS if not ("logits" in run[1] and "cache" in run[0])], ids=str
)
@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-8B"])
def test_one_layer_and_the_last_steps_have_the_peak_of_all_on_every_device(model, knobs, work):
    for part in split(model, {0: 5, 1: 6, 2: rest(model, 11)}, work, **knobs).devices.values():
        exact = exact_replay(part)
        # generate keeps a chunk's logits, or the first device their copy, through the next chunk.
        logits = 4 * 151_936 * 2 if "prefill_chunk_size" in knobs and part.architecture.starts else 0
        assert exact.summed == pytest.approx(exact.peak, rel=0.002, abs=logits + 2**10)
        assert exact.left == exact.loaded + sum(workspaces(part.architecture, part.profile)), (
            "everything else is given back"
        )


# Weights are two bytes a parameter in bf16: 233,057,792 or 487,615,488 a layer; the token table, and with the last norm
# a head of its size, 544,997,376 or 778,567,680.
GOLDEN = [
    (
        ("Qwen2.5-7B", {0: 14, 1: 14}, {"prompt_len": 8_000}, {}),
        {
            0: (7_615_612_928, 229_605_376, 1_148_218_880, 34_604_032, 9_414_115_328, 7_615_613_952, 10_199_498_752),
            1: (7_615_620_096, 229_605_376, 1_089_370_624, 34_603_008, 9_221_177_344, 7_615_620_096, 10_006_560_768),
        },
    ),
    (
        ("Qwen2.5-7B", {0: 20, 1: 8}, {"prompt_len": 8_000, "batch_size": 2}, {"weights": "nf4", **FUSED}),
        {
            0: (3_495_043_632, 656_015_360, 2_287_932_928, 41_974_224, 6_773_800_960, 3_632_044_032, 7_559_184_384),
            1: (2_052_021_472, 262_406_144, 2_171_958_272, 39_264_032, 5_236_588_544, 2_185_781_248, 6_021_971_968),
        },
    ),
    (
        ("Qwen2.5-32B", {0: 32, 1: 32}, {"prompt_len": 512}, FUSED),
        {
            0: (32_763_871_232, 68_157_440, 110_380_544, 34_604_032, 33_009_172_480, 32_763_872_256, 33_794_555_904),
            1: (32_763_881_472, 68_157_440, 105_123_840, 34_603_008, 33_007_075_328, 32_763_881_472, 33_792_458_752),
        },
    ),
    (
        (
            "Qwen2.5-32B",
            {0: 40, 1: 24},
            {"prompt_len": 32_000},
            {"weights": "nf4", "prefill_chunk_size": 1024, **FUSED},
        ),
        {
            0: (11_620_094_560, 5_244_190_720, 458_639_872, 43_676_064, 17_534_287_872, 11_897_487_360, 18_319_671_296),
            1: (7_594_921_120, 3_146_514_432, 446_275_584, 40_344_416, 11_603_542_016, 7_869_202_432, 12_388_925_440),
        },
    ),
]
PARTS = ("weights", "kv_cache", "activations", "workspace", "peak_reserved", "load_peak", "process_total")


@pytest.mark.parametrize(("row", "sizes"), GOLDEN, ids=str)
def test_golden_rows(row, sizes):
    model, layers, work, knobs = row
    parts = split(model, layers, work, **knobs).devices
    assert {device: tuple(getattr(part, name) for name in PARTS) for device, part in parts.items()} == sizes


# Plans.


@pytest.mark.parametrize(
    "vram",
    [
        {0: "12GiB", 1: "24GiB"},
        dict.fromkeys(range(3), "9GiB"),
        *(pytest.param(vram, marks=pytest.mark.full) for vram in (TWO, {0: "40GiB", 1: "30GiB"})),
    ],
    ids=str,
)
def test_a_plan_fits_every_device_and_takes_the_first_step_that_does(vram):
    chosen = qv.plan("Qwen2.5-32B", vram=vram, **RAM, prompt_len=4_000)
    assert list(chosen.budget.devices) == list(chosen.estimate.devices) == list(vram)
    search = Search("", chosen.estimate.architecture, chosen.workload, chosen.budget, "auto", {}, machine=DEFAULT)
    candidates = list(search.candidates())
    fitting = [number for number, candidate in enumerate(candidates) if fits(candidate.estimate, chosen.budget)]
    assert chosen.steps[: len(searched(chosen))] == candidates[fitting[0]].steps
    found = candidates[fitting[0]].estimate.profile
    assert (chosen.profile.weights, chosen.profile.kv_cache) == (found.weights, found.kv_cache)
    for device, part in chosen.estimate.devices.items():
        assert part.needed_bytes <= chosen.budget.devices[device]


@pytest.mark.parametrize(
    *thinned(
        1,
        model=["Qwen2.5-7B", "Qwen2.5-3B", "Qwen3-14B"],
        vram=[TWO, {0: "24GiB", 1: "9GiB"}, {0: "5GiB", 3: "40GiB"}],
    ),
    ids=str,
)
def test_no_other_split_of_two_leaves_much_more_room(model, vram):
    chosen = qv.plan(model, vram=vram, **RAM, profile="int4-flash", prompt_len=6_000)
    knobs = {"weights": "nf4", "dequantization": "tiled", "kernels": "fused", **FUSED}

    def fullest(layers):
        parts = split(model, layers, {"prompt_len": 6_000, "max_new_tokens": 512}, **knobs).devices
        return max(part.needed_bytes / chosen.budget.devices[device] for device, part in parts.items())

    first, second = vram
    every = [fullest({first: count, second: rest(model, count)}) for count in range(1, rest(model, 0))]
    assert fullest(split_of(chosen.estimate)) < 1.01 * min(every)


def test_a_plan_may_count_on_segments_that_each_device_gives_back():
    knobs = {"profile": "default", "prefill_chunk_size": 1_024, "prompt_len": 8_000, **RAM}
    parts = qv.plan("Qwen2.5-7B", vram={0: "12GiB", 1: "12GiB"}, **knobs).estimate
    vram = {device: part.needed_bytes for device, part in parts.devices.items()}
    chosen = qv.plan("Qwen2.5-7B", vram=vram, **knobs)
    assert chosen.to_dict()["estimate"]["needed_bytes"] == sum(vram.values()) < chosen.estimate.process_total
    for device, part in chosen.estimate.devices.items():
        beside = part.process_total - part.peak_reserved
        limit = chosen.budget.devices[device] - beside
        assert limit < part.peak_reserved
        allocator = replay_load(part.architecture, part.profile, limit).copy(limit)
        replay_generation(allocator, part.architecture, part.profile, part.workload)
        assert allocator.peak_reserved <= limit
        assert not _runs_within(part.architecture, part.profile, part.workload, limit * 97 // 100)


def test_modules_follow_their_layers_and_a_shared_head_its_table():
    untied, tied = (qv.plan(model, vram=TWO, **RAM).device_map for model in ("Qwen2.5-7B", "Qwen2.5-3B"))
    assert (untied["model.embed_tokens"], untied["model.rotary_emb"]) == (0, 0)
    assert (untied["model.norm"], untied["lm_head"]) == (1, 1)
    assert (tied["model.embed_tokens"], tied["model.norm"], tied["lm_head"]) == (0, 1, 0)
    for where in (untied, tied):
        layers = [device for name, device in where.items() if ".layers." in name]
        assert layers == sorted(layers)
        assert set(layers) == {0, 1}


def test_a_table_on_the_host_is_on_no_device():
    chosen = qv.plan("Qwen2.5-7B", vram=TWO, **RAM, embeddings="host")
    assert chosen.device_map["model.embed_tokens"] == "cpu"
    assert chosen.estimate.host == 152_064 * 3_584 * 2


def test_devices_follow_in_the_order_of_their_numbers():
    chosen = qv.plan("Qwen2.5-7B", vram={2: "9GiB", 1: "20GiB"}, **RAM)
    assert list(chosen.budget.devices) == [1, 2]
    assert (chosen.device_map["model.layers.0"], chosen.device_map["lm_head"]) == (1, 2)


def test_one_named_device_is_where_everything_goes():
    chosen = qv.plan("Qwen2.5-7B", vram={3: "20GiB"}, **RAM)
    assert set(chosen.device_map.values()) == {3}
    assert chosen.estimate == qv.plan("Qwen2.5-7B", vram="20GiB", **RAM).estimate
    assert "vram={3: 21474836480}" in chosen.call


def test_a_plan_comes_back_from_json_with_its_split():
    chosen = qv.plan("Qwen2.5-14B", vram={0: "24GiB", 1: "12GiB"}, **RAM, prompt_len=8_000)
    data = json.loads(json.dumps(chosen.to_dict()))
    assert data["split"] == {str(device): count for device, count in split_of(chosen.estimate).items()}
    assert data["estimate"]["devices"]["1"]["weights"] == chosen.estimate.devices[1].weights
    back = qv.Plan.from_dict(data)
    assert back == chosen
    assert back.device_map == chosen.device_map
    for broken in ({}, {"0": 24}, {"0": 47, "1": 2}, {"0": 48, "1": 0}, {"0": 24, "2": 24}, {"first": 24}):
        with pytest.raises(qv.ConfigError, match="this is no plan"):
            qv.Plan.from_dict({**data, "split": broken})


def test_a_plan_says_what_each_device_takes_and_ends_with_its_call():
    chosen = qv.plan("Qwen2.5-14B", vram={0: "24GiB", 1: "12GiB"}, **RAM)
    text = str(chosen)
    assert "fits in 24.00 GiB of GPU 0 and 12.00 GiB of GPU 1" in text
    for part in chosen.estimate.devices.values():
        assert f"{part.weights:,}" in text
        assert f"{part.weights:,}" in chosen.estimate._repr_html_()
    again = eval(chosen.call.replace("qv.load", "qv.plan"), {"qv": qv})
    assert again.device_map == chosen.device_map


def test_the_inverse_questions_take_several_devices():
    knobs = {"weights": "nf4", "kv_cache": "bf16", "kv_device": "device", **RAM}
    vram = {0: "11GiB", 1: "11GiB"}
    longest = qv.max_context("Qwen2.5-32B", vram, **knobs)
    assert 512 < longest < qv.max_context("Qwen2.5-32B", "22GiB", **knobs)
    qv.plan("Qwen2.5-32B", vram=vram, **knobs, prompt_len=longest - 512)
    with pytest.raises(qv.DoesNotFitError):
        qv.plan("Qwen2.5-32B", vram=vram, **knobs, prompt_len=longest - 511)


def test_a_settled_split_is_kept_for_another_workload():
    chosen = qv.plan("Qwen2.5-7B", vram={0: "24GiB", 1: "9GiB"}, **RAM)
    work, profile = chosen.workload, chosen.profile
    search = Search("", chosen.estimate.architecture, work, chosen.budget, profile, {}, {0: 10, 1: 18}, machine=DEFAULT)
    assert split_of(search.estimate(profile, work)) == {0: 10, 1: 18} != split_of(chosen.estimate)


def test_an_offload_map_over_two_devices_keeps_every_layer_on_one():
    where = qv.offload_map("Qwen2.5-14B", vram={0: "16GiB", 1: "16GiB"}, **RAM)
    assert {device for name, device in where.items() if ".layers." in name} == {0, 1}
    with pytest.raises(qv.DoesNotFitError, match=r"GiB on GPU 0 and .* GiB on GPU 1, CUDA .* 8\.00 GiB and 8\.00 GiB"):
        qv.offload_map("Qwen2.5-14B", vram={0: "8GiB", 1: "8GiB"}, **RAM)
    with pytest.raises(qv.NotSupportedError, match=r"streamed_layers=3 over 2 GPUs cannot be loaded yet"):
        qv.offload_map("Qwen2.5-14B", vram={0: "16GiB", 1: "16GiB"}, **RAM, layers_on_cpu=3)


# Refusals.


def test_a_refusal_has_every_devices_bytes():
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.plan("Qwen2.5-7B", vram={0: "2GiB", 1: "1GiB"}, **RAM, prompt_len=4_000)
    error = caught.value
    parts = error.estimate.devices
    assert error.devices == {0: (parts[0].needed_bytes, 2 * GIB), 1: (parts[1].needed_bytes, GIB)}
    assert (error.needed_bytes, error.budget_bytes) in error.devices.values()
    needs = [f"{part.needed_bytes / GIB:.2f} GiB on GPU {device}" for device, part in parts.items()]
    assert f"needs {' and '.join(needs)}, CUDA contexts included; 2.00 GiB and 1.00 GiB are allowed" in str(error)


def test_a_refusal_names_the_host_where_that_is_short():
    ask = {"profile": "int4-flash", "embeddings": "host", "ram": "512MiB"}
    for vram in (TWO, {0: "20GiB"}, "20GiB"):
        with pytest.raises(
            qv.DoesNotFitError, match=r"needs 1\.02 GiB of host memory; 0\.50 GiB are allowed"
        ) as caught:
            qv.plan("Qwen2.5-7B", vram=vram, **ask)
        error = caught.value
        assert (error.needed_bytes, error.budget_bytes) == (error.estimate.host, GIB // 2)
        assert error.devices.keys() == ({0, 1} if vram is TWO else set())
        assert all(needed < offered for needed, offered in error.devices.values())
    with pytest.raises(qv.DoesNotFitError, match=r"of 28 layers on the host needs .* of host memory; 1\.50 GiB are"):
        qv.offload_map("Qwen2.5-7B", vram="12GiB", ram="1.5GiB")


def test_layers_are_streamed_by_one_device_and_never_by_several():
    streams = qv.plan("Qwen2.5-7B", vram="4GiB", **RAM)
    assert streams.profile.streamed_layers > 0
    with pytest.raises(qv.DoesNotFitError, match=" on GPU 0 and ") as caught:
        qv.plan("Qwen2.5-7B", vram={0: "2GiB", 1: "2GiB"}, **RAM)
    assert caught.value.estimate.profile.streamed_layers == 0


@pytest.mark.parametrize(
    "knobs", [{"streamed_layers": 3}, {"compiled": True, "cache": "static", "attention": "fused"}], ids=str
)
def test_what_works_on_one_device_alone_is_refused_by_name(knobs):
    with pytest.raises(qv.NotSupportedError, match="over 2 GPUs cannot be loaded yet; use .* or one GPU") as caught:
        qv.plan("Qwen2.5-7B", profile="default", vram=TWO, **RAM, **knobs)
    assert caught.value.knob in knobs


def test_more_devices_than_layers(untied):
    with pytest.raises(qv.WorkloadError, match="vram names 4 GPUs for a model of num_hidden_layers 3"):
        qv.plan(untied, vram=dict.fromkeys(range(4), "8GiB"), **RAM)


@pytest.mark.torch
def test_a_machine_with_fewer_gpus_is_refused_before_anything_is_read(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    text = r"vram names GPU 1 and 2, and torch sees 1 here, numbered from 0; name those, or check CUDA_VISIBLE_DEVICES"
    with pytest.raises(qv.BackendUnavailableError, match=text):
        qv.load("no/such-model", vram={0: "8GiB", 1: "8GiB", 2: "8GiB"})


# The reserve.


@pytest.mark.parametrize(("reserve", "kept"), [(None, 0), (0, 0), ("512MiB", GIB // 2), (GIB, GIB)])
def test_a_reserve_comes_off_every_device(reserve, kept):
    assert Budget.of("8GiB", "16GiB", reserve).vram == 8 * GIB - kept
    assert Budget.of(TWO, "16GiB", reserve).devices == {0: 20 * GIB - kept, 1: 20 * GIB - kept}
    assert Budget.of(TWO, "16GiB", reserve).vram == 40 * GIB - 2 * kept
    host = Budget.of({}, "16GiB", reserve)
    assert (host.vram, host.ram) == (None, 16 * GIB - kept)


def test_layers_are_streamed_to_keep_a_reserve_free():
    resident = qv.plan("Qwen2.5-7B", vram="5.5GiB", **RAM)
    kept = qv.plan("Qwen2.5-7B", vram="5.5GiB", reserve="1.5GiB", **RAM)
    assert resident.profile.streamed_layers == 0 < kept.profile.streamed_layers
    assert kept.estimate == qv.plan("Qwen2.5-7B", vram="4GiB", **RAM).estimate
    assert kept.estimate.needed_bytes <= kept.budget.vram == 4 * GIB
    assert qv.Plan.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept


def test_a_reserve_larger_than_the_device_leaves_nothing():
    with pytest.raises(qv.DoesNotFitError, match=r"0\.00 GiB are allowed") as caught:
        qv.plan("Qwen2.5-0.5B", vram="2GiB", reserve="3GiB", **RAM)
    assert caught.value.budget_bytes == 0


@pytest.mark.parametrize("bare", [16, "16", True, "a lot"])
def test_a_reserve_needs_a_unit(bare):
    with pytest.raises(qv.UnitError, match="reserve is"):
        qv.plan("Qwen2.5-7B", vram="20GiB", reserve=bare)


def test_plans_and_maps_keep_the_reserve_free():
    smallest = qv.min_vram("Qwen2.5-7B", profile="default")
    ask = {"vram": smallest + GIB, "profile": "default", **RAM}
    assert qv.plan("Qwen2.5-7B", **ask, reserve="1GiB").budget_text.endswith("of the GPU (1.00 GiB more kept free)")
    assert set(qv.offload_map("Qwen2.5-7B", **ask, reserve="1GiB").values()) == {0}
    with pytest.raises(qv.DoesNotFitError):
        qv.plan("Qwen2.5-7B", **ask, reserve=GIB + 1)
    assert "cpu" in qv.offload_map("Qwen2.5-7B", **ask, reserve=GIB + 1).values()


@pytest.mark.parametrize("knobs", [{}, {"weights": "nf4", "attention": "fused", "cache": "preallocated"}], ids=str)
@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-7B"])
def test_what_gpus_need_together_at_least_is_the_same_for_every_split(model, knobs):
    whole = resolve_model(model)[1].num_hidden_layers
    together = [
        sum(map(_at_least, split(model, {0: first, 1: whole - first}, **knobs).devices.values()))
        for first in range(1, whole)
    ]
    assert max(together) < 1.001 * min(together)


def test_budgets_that_hold_too_little_together_hold_no_split():
    """Where balancing is left out, because no split can fit, none does."""
    least = qv.plan("Qwen2.5-0.5B", vram={0: "8GiB", 1: "8GiB"}, profile="default").estimate
    need = sum(_at_least(part) for part in least.devices.values())
    for share in (0.2, 0.5, 0.7):
        budgets = {0: int(share * need / 1.02), 1: int((1 - share) * need / 1.02)}
        for first in range(1, 24):
            parts = split("Qwen2.5-0.5B", {0: first, 1: 24 - first}).devices
            assert any(part.needed_bytes > budgets[device] for device, part in parts.items())
