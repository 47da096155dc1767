"""One model over two GPUs: run with `pytest -m gpu` where there are two. Tokens, bytes of each device, and caps."""

import gc

import pytest
import torch

import qwen_vram as qv
from qwen_vram.arithmetic.gpu_split import split_of
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.measure import process_bytes
from qwen_vram.runtime.offload.host_embedding import HostEmbedding
from tests.conftest import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

BOTH = {0: "8GiB", 1: "8GiB"}
FUSED = {"attention": "fused", "cache": "preallocated"}
KNOBS = [
    {"attention": "sdpa"},
    {"attention": "eager"},
    {"attention": "sdpa", "cache": "static"},
    FUSED,
    {**FUSED, "prefill_chunk_size": 64},
    {**FUSED, "embeddings": "host"},
    {**FUSED, "kv_cache": "int8"},
    {**FUSED, "kv_cache": "int4", "prefill_chunk_size": 64},
    {**FUSED, "kv_device": "host"},
    {**FUSED, "kv_device": "host", "embeddings": "host", "prefill_chunk_size": 64},
]
QUESTIONS = [one.prompt for name in ("math", "recall") for one in examples(name, "held_out", seed=7, count=3)]
# Large enough for a hundredth to be more than the allocator's steps.
LARGE = {
    "vocab_size": 32_768,
    "hidden_size": 2_048,
    "intermediate_size": 6_144,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("large"), **LARGE)


@pytest.fixture(scope="module")
def large_tied(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("large_tied"), kind="qwen3", tied=True, **LARGE)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    gc.collect()
    torch.cuda.empty_cache()


def answers(model, vram, **knobs):
    with qv.load(model, profile="default", vram=vram, prompt_len=1_000, batch_size=6, progress=False, **knobs) as llm:
        alone = [llm.chat(question, max_new_tokens=48, do_sample=False) for question in QUESTIONS]
        together = llm.generate(QUESTIONS, max_new_tokens=24, do_sample=False)
        streamed = "".join(llm.stream(QUESTIONS[0], max_new_tokens=24, do_sample=False))
        return alone, together, streamed


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_two_devices_say_what_one_says(demo, weights, knobs):
    assert answers(demo, BOTH, weights=weights, **knobs) == answers(demo, {0: "8GiB"}, weights=weights, **knobs)


@pytest.mark.parametrize("cache", ["preallocated", "dynamic"])
def test_beams_are_chosen_on_both_devices(demo, cache):
    found = []
    for vram in (BOTH, {0: "8GiB"}):
        with qv.load(demo, profile="default", vram=vram, batch_size=3, progress=False, cache=cache) as llm:
            found.append(llm.chat(QUESTIONS[0], max_new_tokens=16, do_sample=False, num_beams=3))
    assert found[0] == found[1]


def test_an_adapter_runs_on_both_devices(untied, adapter):
    found = []
    for vram in (BOTH, {0: "8GiB"}):
        with qv.load(untied, profile="default", vram=vram, adapter=adapter, progress=False) as llm:
            found.append(llm.generate("one two three", max_new_tokens=16, do_sample=False))
            for device, one in llm.report().devices.items():
                assert one.measured["weights"] == one.estimate.weights, device
    assert found[0] == found[1]


def check_bytes(llm):
    """Weights are exact on each device, and peaks within a hundredth."""
    report = llm.report()
    assert report.devices.keys() == {0, 1}
    for device, one in report.devices.items():
        assert one.measured["weights"] == one.estimate.weights, device
        if "kv_cache" in one.measured:
            # A growing cache never holds the last token.
            assert one.measured["kv_cache"] == pytest.approx(one.estimate.kv_cache, rel=0.001), device
            assert one.measured["peak_allocated"] == pytest.approx(one.estimate.peak_allocated, rel=0.01), report
        assert one.measured["load_peak"] == pytest.approx(one.estimate.load_peak, rel=0.01), report


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_each_device_takes_what_was_promised_of_it(large, weights, knobs):
    work = {"prompt_len": 3_000, "max_new_tokens": 16, "batch_size": 2}
    with qv.load(large, profile="default", vram=BOTH, weights=weights, progress=False, **work, **knobs) as llm:
        llm.probe()
        if weights == "int8":  # whose outliers depend on the data
            assert llm.report().devices[1].measured["weights"] == llm.plan.estimate.devices[1].weights
        else:
            check_bytes(llm)


@pytest.mark.parametrize("knobs", [{"attention": "sdpa"}, {**FUSED, "prefill_chunk_size": 512}], ids=str)
def test_a_shared_head_stays_with_its_table(large_tied, knobs):
    work = {"prompt_len": 3_000, "max_new_tokens": 16}
    with qv.load(large_tied, profile="default", vram=BOTH, progress=False, **work, **knobs) as llm:
        llm.probe()
        check_bytes(llm)
        assert llm.model.lm_head.weight.data_ptr() == llm.model.model.embed_tokens.weight.data_ptr()


def test_modules_and_cache_are_where_the_plan_says(large):
    vram = {0: "6GiB", 1: "3GiB"}
    with qv.load(large, profile="default", vram=vram, progress=False, embeddings="host", **FUSED) as llm:
        assert isinstance(llm.model.model.embed_tokens, HostEmbedding)
        for name, where in llm.plan.device_map.items():
            found = {parameter.device.index for parameter in llm.model.get_submodule(name).parameters()}
            assert found <= {where}, name
        cache = llm.new_cache(max_length=64)
        llm.model.generate(
            **llm.tokenizer("one two", return_tensors="pt").to(llm.device), past_key_values=cache, max_new_tokens=4
        )
        counts = split_of(llm.plan.estimate)
        assert [layer.keys.device.index for layer in cache.layers] == [0] * counts[0] + [1] * counts[1]


def test_the_order_of_devices_is_free_of_the_current_one(large):
    """The second GPU alone, and as the current device."""
    gc.collect()
    before = torch.cuda.memory_allocated(0)
    with qv.load(large, profile="default", vram={1: "8GiB"}, progress=False, prompt_len=64, **FUSED) as llm:
        assert llm.device == torch.device("cuda", 1)
        alone = llm.generate("one two three", max_new_tokens=8, do_sample=False)
        assert torch.cuda.memory_allocated(0) == before
    with torch.cuda.device(1), qv.load(large, profile="default", vram=BOTH, progress=False, **FUSED) as llm:
        assert llm.generate("one two three", max_new_tokens=8, do_sample=False) == alone


def test_a_plan_over_two_devices_is_verified(large):
    with qv.load(large, vram=BOTH, prompt_len=3_000, progress=False, verify=True) as llm:
        assert "on cuda:0, cuda:1" in repr(llm)


def test_more_than_planned_is_refused_with_the_split_that_is_loaded(large):
    with qv.load(large, vram={0: "2.2GiB", 1: "2.2GiB"}, prompt_len=512, batch_size=1, progress=False, weights="bf16",
                 kv_cache="bf16", kv_device="device") as llm:  # fmt: skip
        with pytest.raises(qv.DoesNotFitError) as caught:
            llm.probe(prompt_len=16_000, batch_size=8)
        assert split_of(caught.value.estimate) == split_of(llm.plan.estimate)


@pytest.mark.parametrize("knobs", [{"profile": "auto"}, {"profile": "default", "weights": "nf4", **FUSED}], ids=str)
def test_caps_on_both_devices_are_kept(large, knobs):
    """Each card cut down to its budget, context and kernels included; the plan runs to its last token."""
    caps = {0: 2_600 * 2**20, 1: 2_200 * 2**20}
    work = {"prompt_len": 6_000, "max_new_tokens": 16}
    with qv.load(large, vram=BOTH, **work, **knobs, progress=False) as llm:  # kernels of both devices are loaded
        llm.probe(prompt_len=512)
    gc.collect()
    torch.cuda.empty_cache()
    for device, cap in caps.items():
        shown = process_bytes(torch.device("cuda", device))
        assert shown is not None, "the driver does not tell what this process takes"
        beside = shown - torch.cuda.memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((cap - beside) / total, device)
    try:
        with qv.load(large, vram=caps, **work, **knobs, progress=False) as llm:
            for device, one in llm.probe().devices.items():
                assert one.measured["process_total"] <= caps[device]
    finally:
        for device in caps:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_closing_gives_the_memory_of_both_back(large):
    before = [torch.cuda.memory_reserved(device) for device in (0, 1)]
    llm = qv.load(large, profile="default", vram=BOTH, prompt_len=512, progress=False)
    llm.probe()
    llm.close()
    for device in (0, 1):
        # cuBLAS keeps its workspace.
        assert torch.cuda.memory_reserved(device) - before[device] <= 100 * 2**20
