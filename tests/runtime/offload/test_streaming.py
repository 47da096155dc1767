"""Streamed layers: the resident model's tokens, bit for bit, and a ring of slots that survives what happens between."""

import gc
import logging
import random
import weakref
from functools import cache

import pytest
import torch

import qwen_vram as qv
from qwen_vram.arithmetic.weights import block_bytes, stored_weights
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.measure import weight_storages
from qwen_vram.runtime.offload.streamer import Streamer
from qwen_vram.runtime.tensors.packed_layout import HostMemory, Layout
from tests.conftest import make_checkpoint
from tests.helpers.tiers import thinned

PROMPTS = [
    "What is 12 + 30?",
    "小测验：小华有三本词典，小军有五颗糖。小华的东西是什么？请用一句话回答。",
    "Write a Python function add_three(x) that returns x plus 3.",
    "The quick brown fox jumps over the lazy dog. " * 8,
]
GREEDY = {"do_sample": False, "eos_token_id": None}
NEW = 8


def load(model, **knobs):
    return qv.load(model, profile="default", progress=False, **knobs)


def tokens(llm, prompts, new=NEW, **options):
    inputs = llm.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(llm.device)
    return llm.model.generate(**inputs, max_new_tokens=new, **GREEDY, **options)


@torch.no_grad()
def logits(llm, prompt=PROMPTS[1]):
    return llm.model(**llm.tokenizer(prompt, return_tensors="pt").to(llm.device)).logits


def check_after_broken_forwards(llm, expected, error):
    """A forward that `error` breaks off in each layer in turn leaves the next one right."""
    for layer in llm.model.model.layers:

        def stop(*_):
            raise error("on the way")

        hook = layer.mlp.register_forward_pre_hook(stop)
        with pytest.raises(error, match="on the way"):
            logits(llm)
        hook.remove()
        assert torch.equal(logits(llm), expected)


@cache
def resident(model, weights, **knobs):
    """Logits without streaming."""
    with load(model, weights=weights, **knobs) as llm:
        return logits(llm)


@cache
def resident_tokens(model, weights, count, new=NEW, **knobs):
    """The tokens of so many prompts without streaming."""
    with load(model, weights=weights, **knobs) as llm:
        return tokens(llm, PROMPTS[:count], new)


def test_a_copy_that_is_interrupted_leaves_no_block_in_its_slot(demo, monkeypatch):
    """Half of a block is over the block that was there before; the next forward copies both again."""
    expected, copy, broken = resident(demo, "fp32"), Streamer._copy, []

    def stop(self, source, slot):
        if not broken:
            broken.append(slot)
            slot.memory[: source.nbytes // 2].copy_(source[: source.nbytes // 2])
            raise KeyboardInterrupt
        copy(self, source, slot)

    with load(demo, weights="fp32", streamed_layers=4) as llm:
        assert torch.equal(logits(llm), expected)
        held = {id(slot): slot.block for slot in llm._streamer.slots}
        with monkeypatch.context() as patch:
            patch.setattr(Streamer, "_copy", stop)
            with pytest.raises(KeyboardInterrupt):
                logits(llm)
        assert held[id(broken[0])] is not None
        assert broken[0].block is None
        llm._streamer._fetch(held[id(broken[0])], broken[0])
        assert torch.equal(logits(llm), expected)


@pytest.mark.parametrize("new", [NEW, pytest.param(200, marks=pytest.mark.full)])
@pytest.mark.parametrize(*thinned(1, weights=["fp32", "bf16", "nf4", "int8"], case=[(3, 1), (5, 4)]))
def test_greedy_tokens_are_those_of_the_resident_model(demo, weights, case, new):
    streamed, batch_size = case
    with load(demo, weights=weights, streamed_layers=streamed) as llm:
        expected = resident_tokens(demo, weights, batch_size, new)
        assert torch.equal(tokens(llm, PROMPTS[:batch_size], new), expected)


@pytest.mark.parametrize(*thinned(1, weights=["fp32", "bf16", "nf4", "int8"], streamed=[1, 2, 4, 5]))
def test_logits_are_those_of_the_resident_model(demo, weights, streamed):
    with load(demo, weights=weights, streamed_layers=streamed) as llm:
        for _ in range(3):
            assert torch.equal(logits(llm), resident(demo, weights))


@pytest.mark.parametrize(
    *thinned(1, weights=["fp16", "nf4-plain", "fp4", "int8"], model=["tied", "qwen3", "sharded"], streamed=[1, 3])
)
def test_every_format_and_model_streams_bit_for_bit(request, model, weights, streamed):
    folder = request.getfixturevalue(model)
    with load(folder, weights=weights) as llm:
        expected = logits(llm)
    with load(folder, weights=weights, streamed_layers=streamed) as llm:
        assert torch.equal(logits(llm), expected)
        assert torch.equal(logits(llm), expected)


def test_a_quantized_head_and_more_than_ten_layers_stay_quantized(tmp_path):
    deep = make_checkpoint(tmp_path, num_hidden_layers=12, hidden_size=128, intermediate_size=256)
    with load(deep, weights="nf4", lm_head="nf4") as llm:
        expected = logits(llm)
    with load(deep, weights="nf4", lm_head="nf4", streamed_layers=6) as llm:
        assert [number for number in range(12) if llm._streamer.blocks[0].layer is llm.model.model.layers[number]] == [
            1
        ]
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
        assert torch.equal(logits(llm), expected)


# bytes


@pytest.mark.parametrize(
    *thinned(1, weights=["fp32", "bf16", "fp16", "nf4", "nf4-plain", "fp4", "int8"], streamed=[1, 2, 4, 5])
)
def test_resident_layers_and_slots_are_what_was_predicted(demo, weights, streamed):
    with load(demo, weights=weights, streamed_layers=streamed) as llm:
        estimate = llm.plan.estimate
        assert llm.report().measured["weights"] == estimate.weights
        block = block_bytes(estimate.architecture, estimate.profile)
        assert [one.blob.nbytes for one in llm._streamer.blocks] == [block] * streamed
        slots = {1: 1, 2: 2, 4: 2, 5: 3}[streamed]  # all five layers, and small ones: a third covers the pause
        assert [slot.memory.nbytes for slot in llm._streamer.slots] == [block] * slots
        assert streamed * block == estimate.host
        assert llm.report().measured["weights"] == estimate.weights
        layers = [index for index, layer in enumerate(llm.model.model.layers)
                  if layer not in [one.layer for one in llm._streamer.blocks]]  # fmt: skip
        real = weight_storages(llm.model, get_backend(weights))
        for stored in stored_weights(estimate.architecture, estimate.profile):
            if not stored.weight.name.startswith("model.layers.") or int(stored.weight.name.split(".")[2]) in layers:
                assert real[stored.weight.name] == stored.nbytes


@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_loading_holds_one_matrix_or_the_slots(weights):
    small = 2**21  # what the allocator cannot split off
    all_streamed = qv.estimate_vram("Qwen2.5-7B", weights=weights, streamed_layers=28)
    assert all_streamed.weights < all_streamed.load_peak < all_streamed.weights + small
    one_streamed = qv.estimate_vram("Qwen2.5-7B", weights=weights, streamed_layers=1)
    resident = qv.estimate_vram("Qwen2.5-7B", weights=weights)
    assert one_streamed.weights == resident.weights
    assert one_streamed.weights < one_streamed.load_peak <= resident.load_peak


def test_tensors_lie_side_by_side_and_aligned_as_their_sizes_allow():
    draw = random.Random(3)
    for _ in range(50):
        tensors = {index: torch.randn(draw.randint(1, 40), draw.choice([1, 3, 8, 64])) for index in range(9)}
        tensors |= {"half": torch.randn(draw.randint(1, 9)).bfloat16(), "offset": torch.tensor(2.5)}
        tensors |= {"bytes": torch.randint(0, 255, (draw.randint(1, 99),), dtype=torch.uint8)}
        layout = Layout(tensors)
        assert layout.nbytes == sum(one.nbytes for one in tensors.values())
        memory = torch.empty(layout.nbytes, dtype=torch.uint8)
        for key, view in layout.views(memory).items():
            assert (view.data_ptr() - memory.data_ptr()) % (view.nbytes & -view.nbytes) == 0
            view.copy_(tensors[key])
        assert all(torch.equal(view, tensors[key]) for key, view in layout.views(memory).items())


def test_published_shapes_keep_the_alignment_that_matrix_products_choose_kernels_by():
    for name in ("Qwen2.5-0.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-32B", "Qwen3-4B", "Qwen3-32B"):
        block = qv.estimate_vram(name).architecture.layers[0].weights
        layout = Layout({one.name: torch.empty(one.shape, dtype=torch.bfloat16, device="meta") for one in block})
        assert all(place.offset % 256 == 0 for place in layout.places.values())


@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_nothing_moves_from_step_to_step(demo, weights):
    with load(demo, weights=weights, streamed_layers=4) as llm:
        engine = llm._streamer
        places = {slot.memory.data_ptr() for slot in engine.slots}, [one.blob.data_ptr() for one in engine.blocks]
        blobs = [one.blob.clone() for one in engine.blocks]
        before = weight_storages(llm.model, get_backend(weights))
        logits(llm), tokens(llm, PROMPTS[:2], 6)
        assert len(engine.slots) == 2
        assert (
            {slot.memory.data_ptr() for slot in engine.slots},
            [one.blob.data_ptr() for one in engine.blocks],
        ) == places
        assert all(torch.equal(one.blob, blob) for one, blob in zip(engine.blocks, blobs))
        if weights != "nf4":  # whose first product on the CPU makes another form of the codes
            assert weight_storages(llm.model, get_backend(weights)) == before


# what runs on top


ON_TOP = [
    {"cache": "preallocated"},
    {"cache": "preallocated", "kv_cache": "int8"},
    {"cache": "preallocated", "kv_cache": "int4"},
    {"cache": "preallocated", "kv_device": "host"},
    {"cache": "static"},
    {"cache": "dynamic", "prefill_chunk_size": 16},
    {"cache": "preallocated", "attention": "fused", "prefill_chunk_size": 16, "embeddings": "host"},
    {"attention": "eager"},
]


@pytest.mark.parametrize(*thinned(1, weights=["bf16", "nf4"], knobs=ON_TOP), ids=str)
def test_caches_chunks_and_attention_work_as_without(demo, weights, knobs):
    answers = []
    for streamed in (0, 4):
        with load(demo, weights=weights, streamed_layers=streamed, batch_size=4, **knobs) as llm:
            answers.append([llm.generate(prompts, max_new_tokens=3, **GREEDY) for prompts in (PROMPTS[3], PROMPTS[:3])])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_an_adapter_stays_on_the_device(untied, adapter, weights):
    pytest.importorskip("peft")
    with load(untied, weights=weights, adapter=adapter) as llm:
        expected = logits(llm)
    with load(untied, weights=weights, adapter=adapter, streamed_layers=3) as llm:
        assert torch.equal(logits(llm), expected)
        assert torch.equal(logits(llm), expected)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
        with llm.model.disable_adapter():
            assert not torch.equal(logits(llm), expected)
        assert torch.equal(logits(llm), expected)


def test_training_through_streamed_layers_is_refused_by_name(untied):
    peft = pytest.importorskip("peft")
    with load(untied, streamed_layers=2) as llm:
        inputs = llm.tokenizer("hello world", return_tensors="pt")
        llm.model(**inputs)  # gradients are on here, and nothing asks for one
        adapted = peft.get_peft_model(llm.model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(
            qv.NotSupportedError, match="computes no gradients.*or load with streamed_layers=0 to train"
        ):
            adapted(**inputs, labels=inputs["input_ids"])
        with torch.no_grad():
            adapted(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_a_streamed_model_is_saved_whole(demo, tmp_path, weights):
    with load(demo, weights=weights) as llm:
        expected = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    with load(demo, weights=weights, streamed_layers=3) as llm:
        found = llm.model.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        llm.model.save_pretrained(tmp_path)
        llm.tokenizer.save_pretrained(tmp_path)
        assert torch.equal(logits(llm), resident(demo, weights))
        found = llm.model.state_dict()
        # A product on the CPU changes resident 4-bit layers; what is streamed comes from the host unchanged.
        streamed = [name for name in found if name.startswith("model.layers.4.")]
        assert all(torch.equal(found[name], expected[name]) for name in streamed)
        if weights != "nf4":
            assert torch.equal(logits(llm), resident(demo, weights))
    with load(tmp_path, **({} if weights == "bf16" else {"weights": weights})) as llm:
        assert torch.equal(logits(llm), resident(demo, weights))


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_a_streamed_model_is_saved_quantized_as_the_resident_one(demo, tmp_path, weights):
    with load(demo, weights=weights) as llm:
        llm.save_quantized(tmp_path / "resident", progress=False)
    with load(demo, weights=weights, streamed_layers=5) as llm:
        for out in ("fresh", "run"):
            llm.save_quantized(tmp_path / out, progress=False)
            assert torch.equal(logits(llm), resident(demo, weights))
    files = [tmp_path / out / "model.safetensors" for out in ("resident", "fresh", "run")]
    assert len({file.read_bytes() for file in files}) == 1


# what happens between


@pytest.mark.parametrize(*thinned(1, weights=["bf16", "nf4", "int8"], error=[RuntimeError, KeyboardInterrupt]))
def test_the_ring_is_right_after_a_forward_that_broke_off(demo, weights, error):
    with load(demo, weights=weights, streamed_layers=4) as llm:
        check_after_broken_forwards(llm, resident(demo, weights), error)


@pytest.mark.parametrize("interrupted", ["copy", "bind"])
def test_the_ring_is_right_after_an_interrupt_of_its_own_work(demo, monkeypatch, interrupted):
    with load(demo, weights="nf4", streamed_layers=4) as llm:
        engine = llm._streamer

        class Broken:
            def __getattr__(self, name):
                raise KeyboardInterrupt

        for number in range(4):
            with monkeypatch.context() as patch:
                if interrupted == "copy":
                    patch.setattr(engine.blocks[number], "blob", Broken())
                else:
                    last = len(engine.blocks[number]._in_slots[0]) // 2
                    broken = [[*binds[:last], Broken(), *binds[last:]] for binds in engine.blocks[number]._in_slots]
                    patch.setattr(engine.blocks[number], "_in_slots", broken)
                with pytest.raises((KeyboardInterrupt, TypeError)):
                    logits(llm), logits(llm)
            assert torch.equal(logits(llm), resident(demo, "nf4"))


@torch.no_grad()
def run_layer(llm, number):
    """Return the result of one layer alone for seven rows that are always the same."""
    hidden = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    places = llm.model.model.rotary_emb(hidden, torch.arange(7)[None])
    return llm.model.model.layers[number](hidden, position_embeddings=places)


@cache
def resident_layers(model, weights):
    """Return the result of each layer for them, without streaming."""
    with load(model, weights=weights) as llm:
        return [run_layer(llm, number) for number in range(len(llm.model.model.layers))]


@pytest.mark.parametrize("streamed", [1, 2, 3, 5])
def test_layers_may_run_in_any_order(demo, streamed):
    draw = random.Random(streamed)
    with load(demo, weights="nf4", streamed_layers=streamed) as llm:
        for number in [draw.randrange(5) for _ in range(30)]:
            assert torch.equal(run_layer(llm, number), resident_layers(demo, "nf4")[number])


def test_two_models_do_not_disturb_each_other(demo):
    settings = {"bf16": 3, "nf4": 5}
    models = [load(demo, weights=weights, streamed_layers=count) for weights, count in settings.items()]
    ids = [resident_tokens(demo, weights, 1) for weights in settings]
    length = ids[0].shape[1] - NEW
    caches = [llm.new_cache(max_length=length + NEW) for llm in models]
    fed = [one[:, :length] for one in ids]
    with torch.no_grad():
        for step in range(NEW):
            for index, llm in enumerate(models):
                out = llm.model(input_ids=fed[index], past_key_values=caches[index])
                fed[index] = out.logits[:, -1:].argmax(-1)
                assert torch.equal(fed[index], ids[index][:, length + step : length + step + 1])
    models[0].close()
    assert torch.equal(logits(models[1]), resident(demo, "nf4"))
    models[1].close()


@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_closing_gives_everything_back_at_once(demo, weights):
    llm = load(demo, weights=weights, streamed_layers=4)
    model, _ = llm
    llm.generate("hello", max_new_tokens=3)
    engine = llm._streamer
    memory = [weakref.ref(one.blob) for one in engine.blocks] + [weakref.ref(slot.memory) for slot in engine.slots]
    storages = {one.blob.untyped_storage().data_ptr() for one in engine.blocks}
    storages |= {slot.memory.untyped_storage().data_ptr() for slot in engine.slots}
    gc.disable()
    try:
        engine.close()
        assert not any(one() is not None for one in memory)
    finally:
        gc.enable()
    held = {one.untyped_storage().data_ptr() for one in gc.get_objects() if type(one) is torch.Tensor}
    assert held.isdisjoint(storages - {0})
    llm.close()
    llm.close()
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_a_model_that_is_dropped_unclosed_gives_everything_back(demo):
    llm = load(demo, streamed_layers=4)
    memory = [weakref.ref(one.blob) for one in llm._streamer.blocks]
    del llm
    gc.collect()
    assert not any(one() is not None for one in memory)


# the host's memory


class Driver:
    def __init__(self, free):
        self.free, self.locked = free, {}

    def cudaHostRegister(self, address, nbytes, flags):
        assert address % 4096 == nbytes % 4096 == flags == 0
        if nbytes > self.free:
            return 2
        self.free -= nbytes
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        self.free += self.locked.pop(address)
        return 0


@pytest.fixture
def driver(monkeypatch):
    driver = Driver(free=5 * 4096)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return driver


def on_a_gpu():
    memory = HostMemory(torch.device("cpu"))
    memory.pinned = True
    return memory


@pytest.mark.parametrize("end", ["give_back", "drop"])
def test_pages_are_locked_block_by_block_and_unlocked(driver, end):
    memory = on_a_gpu()
    blobs = [memory.take(nbytes) for nbytes in (4096, 5000)]
    assert [one.nbytes for one in blobs] == [4096, 5000]
    assert driver.locked == {blobs[0].data_ptr(): 4096, blobs[1].data_ptr(): 8192}
    if end == "give_back":
        memory.give_back()
        memory.give_back()
    else:
        del memory
    assert driver.locked == {}
    assert driver.free == 5 * 4096


def test_where_locking_fails_it_says_so_once_and_goes_on(driver, caplog):
    memory = on_a_gpu()
    with caplog.at_level(logging.WARNING):
        blobs = [memory.take(8192) for _ in range(5)]
    assert [one.nbytes for one in blobs] == [8192] * 5
    assert len(driver.locked) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "streamed layers stay in unpinned host memory, from which copies are slower: CUDA error 2"
    ]
    memory.give_back()
    assert driver.locked == {}


# refusals


def test_a_backend_that_cannot_swap_tensors_is_refused_by_name(demo, monkeypatch):
    class Foreign:
        name = "foreign"

        def check(self, profile, device): ...

        def load(self, request): ...

        def storages(self, module): ...

    import qwen_vram.runtime.loading.load as loader

    monkeypatch.setattr(loader, "get_backend", lambda name: Foreign())
    with pytest.raises(
        qv.NotSupportedError, match="streamed_layers=1: the backend 'foreign' of weights='bf16' does not"
    ):
        load(demo, streamed_layers=1)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("weights", "streamed"), [("bf16", 1), ("bf16", 2), ("bf16", 12), ("nf4", 1), ("nf4", 3), ("nf4", 12), ("int8", 3)]
)
def test_on_a_gpu_tokens_and_bytes_are_those_that_were_promised(wide, weights, streamed):
    before_logits = resident(wide, weights, attention="fused")
    one, four = (resident_tokens(wide, weights, count, 200, attention="fused") for count in (1, 4))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    knobs = {"attention": "fused", "cache": "preallocated", "prompt_len": 512, "max_new_tokens": 200, "batch_size": 4}
    with load(wide, weights=weights, streamed_layers=streamed, **knobs) as llm:
        promised, measured = llm.plan.estimate, llm.report().measured
        assert measured["weights"] == promised.weights
        assert measured["load_peak"] <= 1.01 * promised.load_peak + 2**21
        assert all(block.blob.is_pinned() for block in llm._streamer.blocks)
        assert torch.equal(logits(llm), before_logits)
        assert torch.equal(tokens(llm, PROMPTS[:1], 200), one)
        assert torch.equal(tokens(llm, PROMPTS, 200), four)
        report = llm.probe()
        promised, measured = report.estimate.peak_allocated, report.measured["peak_allocated"]
        assert measured == pytest.approx(promised, rel=0.01, abs=2**21)
    # cuBLAS keeps its workspace.
    assert torch.cuda.memory_allocated() - before <= 2 * 34_603_008


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_on_a_gpu_nothing_grows_over_200_tokens(wide, weights):
    with load(wide, weights=weights, streamed_layers=12) as llm:
        cache_of = llm.new_cache(max_length=300)
        ids = torch.ones(1, 64, dtype=torch.long, device="cuda")
        allocated = []
        with torch.inference_mode():
            for _ in range(200):
                ids = llm.model(input_ids=ids, past_key_values=cache_of).logits[:, -1:].argmax(-1)
                allocated.append(torch.cuda.memory_allocated())
        assert len(set(allocated[3:])) == 1


@pytest.mark.gpu
def test_on_a_gpu_the_ring_is_right_after_a_forward_that_broke_off(wide):
    with load(wide, weights="nf4", streamed_layers=12) as llm:
        check_after_broken_forwards(llm, resident(wide, "nf4"), KeyboardInterrupt)


@pytest.mark.gpu
def test_on_a_gpu_two_models_do_not_disturb_each_other(wide):
    settings = {"bf16": 12, "nf4": 5}
    models = [load(wide, weights=weights, streamed_layers=count) for weights, count in settings.items()]
    for _ in range(20):
        found = [logits(llm) for llm in models]
        for one, weights in zip(found, settings):
            assert torch.equal(one, resident(wide, weights))
    models[0].close()
    assert torch.equal(logits(models[1]), resident(wide, "nf4"))
    models[1].close()
