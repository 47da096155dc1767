"""Several devices at run time, without a GPU: what crosses between them, caches that are on both, and reports."""

from types import SimpleNamespace

import pytest
import torch

import qwen_vram as qv
from qwen_vram.arithmetic.pipeline import slices
from qwen_vram.arithmetic.replay.generation import Generation
from qwen_vram.arithmetic.replay.live_bytes import LiveBytes
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.runtime.kv_cache.host import HostCache
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache, cache_bytes
from qwen_vram.runtime.loading.device_map import device_map
from qwen_vram.runtime.loading.devices import check_free
from qwen_vram.runtime.loading.verify import verify
from qwen_vram.runtime.measure import Report
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

GIB = 2**30
PLACES = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture(scope="module")
def chosen():
    return qv.plan("Qwen2.5-7B", vram={0: "20GiB", 1: "20GiB"}, ram="64GiB")


def test_the_copies_that_accelerate_makes_are_the_ones_counted(untied):
    """The second device is "meta": the hooks are the real ones, and a tensor on it is one that was brought there."""
    from accelerate import dispatch_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    where |= dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), "meta")
    dispatch_model(model, where, main_device="cpu", skip_keys=model._skip_keys_device_placement)
    arrived, inputs = {}, {}

    def watch(number):
        def hook(module, args, kwargs):
            arrived[number] = [kwargs["attention_mask"], *kwargs["position_embeddings"], kwargs["position_ids"]]
            inputs[number] = kwargs["hidden_states"]

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(watch(number), with_kwargs=True)
    tokens = torch.randint(0, 3072, (2, 40))
    padding = torch.ones_like(tokens)
    padding[0, :7] = 0
    cache = PreallocatedCache(3, max_length=50, split=(1, 2))
    with torch.no_grad():
        model.model(
            input_ids=tokens,
            attention_mask=padding,
            position_ids=torch.arange(40).expand(2, 40).contiguous(),
            past_key_values=cache,
            use_cache=True,
        )
    assert {tensor.device.type for tensor in arrived[0]} == {"cpu"}
    assert {tensor.device.type for number in (1, 2) for tensor in (*arrived[number], inputs[number])} == {"meta"}
    assert not {id(tensor) for tensor in arrived[1]} & {id(tensor) for tensor in arrived[2]}, "each layer has its own"

    _, second = slices(resolve_model(untied)[1], (1, 2))
    workload = Workload(prompt_len=40, max_new_tokens=10, batch_size=2, padded=True)
    taken = Generation(LiveBytes(), second, Profile(cache="preallocated"), workload).copies(40, 0)
    assert taken == [tensor.nbytes for tensor in arrived[1]] == [tensor.nbytes for tensor in arrived[2]]
    assert cache_bytes(cache, torch.device("meta")) == 2 * cache_bytes(cache, torch.device("cpu")) > 0


@pytest.mark.parametrize(
    "knobs",
    [
        {"cache": "dynamic"},
        {"cache": "static"},
        {"cache": "preallocated", "attention": "fused", "prefill_chunk_size": 16},
        {"cache": "preallocated", "kv_cache": "int8"},
        {"cache": "preallocated", "kv_device": "host", "embeddings": "host"},
        {"weights": "nf4", "embeddings": "host"},
        {"weights": "nf4", "dequantization": "tiled"},
    ],
    ids=str,
)
def test_hooks_leave_caches_and_a_host_table_alone(demo, knobs):
    from accelerate import dispatch_model

    prompt = "What is 12 + 30?"
    with qv.load(demo, profile="default", progress=False, **knobs) as llm:
        plain = llm.chat(prompt, max_new_tokens=24, do_sample=False)
        where = {name: "cpu" for name in llm.plan.device_map}
        skipped = llm.model._skip_keys_device_placement
        dispatch_model(llm.model, where, main_device="cpu", skip_keys=skipped, force_hooks=True)
        assert hasattr(llm.model.model.layers[0], "_hf_hook")
        assert llm.chat(prompt, max_new_tokens=24, do_sample=False) == plain


def test_a_split_is_loaded_where_it_was_planned(chosen):
    where = device_map(chosen, PLACES[0])
    assert where == chosen.device_map
    assert {0, 1} == set(where.values())


def test_a_host_cache_has_slots_on_every_device():
    host, plain = HostCache(5, max_length=12, split=(2, 3)), PreallocatedCache(5, max_length=12)
    for tokens in (7, 1, 1, 3):
        for layer in range(5):
            keys, values = torch.randn(2, 2, 3, tokens, 16)
            held = host.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(held, plain.update(keys, values, layer), strict=True))
    assert host.layers[0].slots is host.layers[1].slots is not host.layers[2].slots
    assert cache_bytes(host) == 4 * host.layers[0].rows.nbytes


@pytest.mark.parametrize("format_", ["bf16", "int8"])
def test_sequences_are_chosen_on_a_layers_own_device(format_):
    cache = PreallocatedCache(2, max_length=200, kv_cache=format_, split=(1, 1))
    for layer, device in enumerate(("cpu", "meta")):
        keys, values = torch.randn(2, 3, 3, 180, 16, device=device)
        cache.update(keys, values, layer)
    cache.batch_select_indices(torch.tensor([2, 0]))
    sizes = [cache_bytes(cache, torch.device(device)) for device in ("cpu", "meta")]
    assert sizes[0] == sizes[1] == cache_bytes(cache) // 2


def test_a_cache_that_does_not_know_the_split_says_so():
    cache = PreallocatedCache(2, max_length=9)
    cache.update(*torch.randn(2, 1, 2, 3, 16), 0)
    with pytest.raises(
        ValueError, match=r"layers are on cpu and on meta, and share one block; say how many each device"
    ):
        cache.update(*torch.randn(2, 1, 2, 3, 16, device="meta"), 1)


def test_a_plan_is_held_against_what_is_free_now(monkeypatch, chosen):
    part = chosen.estimate.devices[1]
    free = {0: 40 * GIB, 1: part.needed_bytes - part.machine.cuda_context}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 80 * GIB))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    check_free(chosen, PLACES)
    free[1] -= 1
    with pytest.raises(qv.DoesNotFitError, match=r"of GPU 1, and of its 80\.00 GiB only .* are free now") as caught:
        check_free(chosen, PLACES)
    assert caught.value.needed_bytes == caught.value.budget_bytes + 1 == part.needed_bytes


def measured_of(estimate):
    names = ("weights", "kv_cache", "peak_allocated", "process_total")
    return {place: {name: getattr(estimate.devices[place.index], name) for name in names} for place in PLACES}


def test_a_report_has_every_device_and_their_sums(chosen):
    report = Report.of(chosen.estimate, measured_of(chosen.estimate))
    data = report.to_dict()
    assert data["weights"] == {"predicted": chosen.estimate.weights, "measured": chosen.estimate.weights}
    assert data["devices"][1]["weights"]["measured"] == chosen.estimate.devices[1].weights
    assert data["load_peak"]["measured"] is None
    assert "GPU 0" in str(report)
    assert f"{chosen.estimate.devices[1].peak_allocated:,}" in str(report)


def test_a_plan_that_does_not_hold_on_one_device_says_on_which(chosen):
    measured = measured_of(chosen.estimate)
    cpu = torch.device("cpu")
    llm = SimpleNamespace(plan=chosen, device=cpu, probe=lambda steps: Report.of(chosen.estimate, measured))
    assert verify(llm).devices.keys() == {0, 1}
    measured[PLACES[1]]["process_total"] = 21 * GIB
    text = r"process_total on GPU 1: .* bytes promised, 22,548,578,304 taken; the budget is 21,474,836,480 bytes"
    with pytest.raises(qv.PlanNotHeldError, match=text) as caught:
        verify(llm)
    assert caught.value.parts == {"process_total on GPU 1": (chosen.estimate.devices[1].process_total, 21 * GIB)}
