"""The KV cache on the host: its bytes on the device, and the same tokens as the cache on the device gives."""

import gc
import logging
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_vram as qv
from qwen_vram.arithmetic.kv_cache import host_kv_bytes
from qwen_vram.arithmetic.replay.allocator import CachingAllocator
from qwen_vram.arithmetic.replay.generation import replay_generation
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.kv_cache.host import HostCache
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache, cache_bytes
from tests.helpers.tiers import thinned

PROMPTS = [one.prompt for name in ("math", "recall", "table") for one in examples(name, "held_out", seed=16, count=1)]
HOST = {"profile": "default", "attention": "sdpa", "cache": "preallocated", "progress": False}


@pytest.fixture(scope="module")
def plain(demo):
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32), AutoTokenizer.from_pretrained(demo)


def states(tokens, *, batch=2, seed=0):
    return torch.randn(batch, 3, tokens, 16, generator=torch.Generator().manual_seed(seed))


def fill(cache, chunks, *, batch=2, seed=0):
    """Update all layers chunk by chunk; returns each layer's last keys and values, copied."""
    out = []
    for step, tokens in enumerate(chunks):
        out = []
        for layer in range(len(cache.layers)):
            number = seed + 100 * step + 2 * layer
            kept = cache.update(states(tokens, batch=batch, seed=number), states(tokens, batch=batch, seed=number + 1),
                                layer)  # fmt: skip
            out.append(tuple(one.clone() for one in kept))
    return out


def same(one, two):
    return all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("chunks", [[7], [1] * 9, [5, 1, 1, 4, 1]], ids=str)
def test_it_holds_what_was_put_into_it(layers, chunks):
    host, device = HostCache(layers, max_length=12), PreallocatedCache(layers, max_length=12)
    assert same(fill(host, chunks), fill(device, chunks))
    assert host.get_seq_length() == device.get_seq_length() == sum(chunks)
    assert host.get_max_length() == 12
    assert host.get_mask_sizes(3, 0) == device.get_mask_sizes(3, 0) == (sum(chunks) + 3, 0)
    for mine, other in zip(host.layers, device.layers, strict=True):
        assert mine.keys.shape == mine.values.shape == (2, 3, 12, 16)
        assert torch.equal(mine.keys[:, :, : mine.length], other.keys[:, :, : mine.length])
        assert torch.equal(mine.values[:, :, : mine.length], other.values[:, :, : mine.length])


def test_no_memory_is_taken_after_the_first_step():
    cache = HostCache(5, max_length=20)
    fill(cache, [3])
    places = {one.data_ptr() for layer in cache.layers for one in (layer.rows, *layer.tensors())}
    fill(cache, [1] * 10)
    assert {one.data_ptr() for layer in cache.layers for one in (layer.rows, *layer.tensors())} == places
    assert len(places) == 5 + 2


def test_a_cache_that_is_dropped_gives_its_memory_back_at_once():
    cache = HostCache(3, max_length=9)
    fill(cache, [4, 1])
    slots, rows = cache.layers[0].slots, weakref.ref(cache.layers[0].rows)
    memory = weakref.ref(slots), rows, *(weakref.ref(one.rows) for one in slots.open_slots)
    gc.disable()
    try:
        del cache, slots
        assert [one() for one in memory] == [None] * 4
    finally:
        gc.enable()


def test_the_next_layer_waits_in_the_other_slot():
    cache = HostCache(3, max_length=9)
    fill(cache, [4])
    engine = cache.layers[0].slots
    for step in range(3):
        for index, layer in enumerate(cache.layers):
            assert engine._find(layer) not in (None, engine.newest)
            cache.update(states(1), states(1), index)
            assert engine.newest.index == layer.index
            assert engine.newest.tokens == 5 + step


def test_layers_may_come_in_any_order():
    host, device = HostCache(4, max_length=30), PreallocatedCache(4, max_length=30)
    fill(host, [3]), fill(device, [3])
    order = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for number, layer in enumerate(order):
        if host.layers[layer].length < 30:
            pair = states(1, seed=number), states(1, seed=number + 1000)
            assert same([host.update(*pair, layer)], [device.update(*pair, layer)])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("model", ["demo", "untied"])
def test_the_bytes_are_the_predicted_ones(request, model, batch_size):
    knobs = {"cache": "preallocated", "kv_device": "host", "batch_size": batch_size}
    estimate = qv.estimate_vram(request.getfixturevalue(model), prompt_len=200, max_new_tokens=30, **knobs)
    shape = estimate.architecture
    cache = HostCache(shape.num_hidden_layers, max_length=230)
    attention = shape.layers[0].attention
    state = torch.zeros(batch_size, attention.key_value_heads, 1, attention.head_dim, dtype=torch.bfloat16)
    for layer in range(shape.num_hidden_layers):
        cache.update(state, state, layer)
    assert cache_bytes(cache) == estimate.kv_cache == 2 * cache.layers[0].rows.nbytes
    on_host = host_kv_bytes(shape, estimate.profile, batch_size=batch_size, context_len=230)
    # Pinned blocks are rounded up to powers of two.
    assert sum(1 << (layer.rows.nbytes - 1).bit_length() for layer in cache.layers) == on_host
    assert all(layer.keys.nbytes + layer.values.nbytes == layer.rows.nbytes for layer in cache.layers)


def test_one_layer_has_one_slot(demo):
    cache = HostCache(1, max_length=10)
    fill(cache, [3, 1, 1])
    assert cache_bytes(cache) == cache.layers[0].rows.nbytes


def test_the_replay_takes_two_slots_for_a_long_context():
    estimate = qv.estimate_vram(
        "Qwen2.5-7B", cache="preallocated", kv_device="host", attention="fused", prompt_len=32_000, max_new_tokens=8,
        prefill_chunk_size=512,
    )  # fmt: skip
    allocator = CachingAllocator()
    replay_generation(allocator, estimate.architecture, estimate.profile, estimate.workload)
    assert 2 * 32_008 * 2048 == estimate.kv_cache < allocator.peak < estimate.kv_cache + 300 * 2**20


@pytest.mark.parametrize("act", [lambda c: c.crop(-4), lambda c: c.reset()], ids=["crop", "reset"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_tokens_can_be_forgotten(act, layers):
    host, device = HostCache(layers, max_length=12), PreallocatedCache(layers, max_length=12)
    for cache in (host, device):
        fill(cache, [6, 1])
        act(cache)
    assert host.get_seq_length() == device.get_seq_length() in (0, 3)
    assert same(fill(host, [2, 1, 1], seed=50), fill(device, [2, 1, 1], seed=50))


def test_more_tokens_than_it_holds_are_refused():
    cache = HostCache(3, max_length=12)
    fill(cache, [12])
    with pytest.raises(ValueError, match="the cache holds 12 tokens and was given 13; make it longer"):
        cache.update(states(1), states(1), 0)
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="the cache holds 12 tokens and was given 13; make it longer"):
        HostCache(3, max_length=12).update(states(13), states(13), 0)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_sequences_are_reordered_selected_and_repeated(layers):
    host, device = HostCache(layers, max_length=12), PreallocatedCache(layers, max_length=12)
    fill(host, [6, 1]), fill(device, [6, 1])
    place = host.layers[0].rows.data_ptr()
    for cache in (host, device):
        cache.reorder_cache(torch.tensor([1, 0]))
    assert same(fill(host, [1], seed=9), fill(device, [1], seed=9))
    assert host.layers[0].rows.data_ptr() == place
    for cache in (host, device):
        cache.batch_repeat_interleave(3)
    assert same(fill(host, [1], batch=6, seed=19), fill(device, [1], batch=6, seed=19))
    for cache in (host, device):
        cache.batch_select_indices(torch.tensor([4, 0, 1]))
    assert same(fill(host, [1, 1], batch=3, seed=29), fill(device, [1, 1], batch=3, seed=29))
    assert cache_bytes(host) == min(layers, 2) * host.layers[0].rows.nbytes
    HostCache(2, max_length=3).batch_repeat_interleave(2)  # nothing is held yet


def test_memory_that_cannot_be_pinned_is_named_once(caplog, monkeypatch):
    real = torch.empty

    def empty(*args, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("out of pinned memory\nand more")
        return real(*args, **options)

    monkeypatch.setattr(torch, "empty", empty)
    engine = HostCache(2, max_length=3).layers[0].slots
    engine.stream = object()  # as on a GPU
    with caplog.at_level(logging.WARNING):
        rows = [engine.host_rows((4, 2), real(1, dtype=torch.bfloat16)) for _ in range(3)]
    assert [(one.shape, one.dtype) for one in rows] == [((4, 2), torch.bfloat16)] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "the KV cache stays in unpinned host memory, from which copies are slower: out of pinned memory"
    ]


@pytest.mark.parametrize(
    *thinned(1, case=[({}, {}), ({"prefill_chunk_size": 16}, {}), ({}, {"num_beams": 2})], count=[1, 3]), ids=str
)
def test_the_bundled_model_answers_as_before(demo, case, count):
    """One prompt, and padded ones."""
    knobs, options = case
    prompts = PROMPTS[0] if count == 1 else PROMPTS
    answers = []
    for kv_device in ("device", "host"):
        with qv.load(demo, kv_device=kv_device, prompt_len=1000, batch_size=6, **{**HOST, **knobs}) as llm:
            answers.append(llm.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, **options))
            report = llm.report()
            assert isinstance(llm.new_cache(max_length=4), HostCache) is (kv_device == "host")
        assert report.measured["kv_cache"] == report.estimate.kv_cache
    assert answers[0] == answers[1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_plain_transformers_generates_with_it(plain, options):
    model, tokenizer = plain
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    length = inputs["input_ids"].shape[1] + 8
    made = []
    for kind in (PreallocatedCache, HostCache):
        cache = kind(model.config.num_hidden_layers, max_length=length)
        made.append(model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False, **options))
    assert torch.equal(*made)


@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [{}, {"prefill_chunk_size": 64}, {"attention": "eager"}], ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS[1], PROMPTS], ids=["one", "padded"])
def test_on_a_gpu_it_answers_as_before_and_takes_what_was_promised(demo, prompts, knobs):
    answers = []
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    for kv_device in ("device", "host"):
        settings = {**HOST, "attention": "fused", **knobs}
        with qv.load(demo, kv_device=kv_device, prompt_len=3000, batch_size=3, **settings) as llm:
            answers.append([llm.generate(prompts, **options) for _ in range(3)])
            report = llm.report()
        promised, measured = report.estimate, report.measured
        assert measured["kv_cache"] == promised.kv_cache
        assert measured["peak_allocated"] <= 1.01 * promised.peak_allocated + 2**21
    assert answers[0] == answers[1]


@pytest.mark.gpu
def test_on_a_gpu_copies_and_compute_wait_for_each_other():
    # Nothing here waits for the device until the end, and layers are far larger than a launch takes.
    generator = torch.Generator("cuda").manual_seed(0)
    host, device = HostCache(5, max_length=4100), PreallocatedCache(5, max_length=4100)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for tokens in [4000, *[1] * 20, 50]:
        for layer in range(5):
            pair = [torch.randn(2, 8, tokens, 128, device="cuda", generator=generator) for _ in range(2)]
            for got, expected in zip(host.update(*pair, layer), device.update(*pair, layer), strict=True):
                wrong += (got != expected).sum()
    torch.cuda.synchronize()
    assert wrong.item() == 0
    assert host.layers[0].rows.is_pinned()
    for mine, other in zip(host.layers, device.layers, strict=True):
        assert torch.equal(mine.keys[:, :, : mine.length].cuda(), other.keys[:, :, : mine.length])
        assert torch.equal(mine.values[:, :, : mine.length].cuda(), other.values[:, :, : mine.length])
