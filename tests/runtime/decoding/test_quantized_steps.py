"""Decode steps over a quantized KV cache: on the CPU as they are, on a GPU captured."""

import pytest
import torch
from transformers import LogitsProcessorList

import qwen_vram as qv
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_cache import QuantizedGraphLayer
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.kv_cache.quantized import QuantizedLayer
from tests.runtime.decoding.test_decode_steps import ASKED, PROMPTS, Watch, steps_of

KV_FORMATS = ("int8", "int4")
KNOBS = {"attention": "fused", "kernels": "fused", "cache": "preallocated", "progress": False}
WORK = {"batch_size": 3, "prompt_len": 200, "max_new_tokens": 120}
KNOBS_OF_ESTIMATE = {"weights": "fp32", "attention": "fused", "kernels": "fused", "cache": "preallocated"}


def states(tokens, seed):
    return torch.randn(2, 3, tokens, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
@pytest.mark.parametrize("prompt", [1, 127, 128, 250])
def test_a_step_that_writes_a_token_leaves_what_an_update_leaves(kv_cache, prompt):
    layers = [QuantizedLayer(400, kv_cache) for _ in range(2)]
    keys, values = states(400, 0), states(400, 1)
    for layer in layers:
        layer.update(keys[:, :, :prompt], values[:, :, :prompt])
    updated, stepped = layers
    for token in range(prompt, 400):
        row = slice(token, token + 1)
        updated.update(keys[:, :, row], values[:, :, row])
        stepped.set_length(stepped.end_after(keys[:, :, row]))
        assert stepped.get_seq_length() == token + 1
        place = token - stepped.quantized
        stepped.new_keys[:, :, place], stepped.new_values[:, :, place] = keys[:, :, token], values[:, :, token]
        assert (stepped.quantized, stepped.whole) == (updated.quantized, updated.whole)
    for codes in ("key_codes", "value_codes"):
        for one, other in zip(*(getattr(layer, codes).tensors() for layer in layers)):
            assert torch.equal(one, other)
    for newest in ("new_keys", "new_values"):
        one, other = (getattr(layer, newest)[:, :, : updated.whole] for layer in layers)
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="the cache holds 400 tokens and was given 401"):
        stepped.end_after(keys[:, :, :1])


def load(folder, kv_cache, *, steps, weights="fp32", **work):
    llm = qv.load(folder, profile="default", weights=weights, kv_cache=kv_cache, **KNOBS, **{**WORK, **work})
    if steps:
        decode_by_steps(llm.model)
        work = llm.plan.workload
        sizes = {"batch_size": work.batch_size, "max_length": work.context_len}
        llm._generations.decoder = Decoder(llm.model, **sizes, backend=None, kv_cache=kv_cache)
    return llm


def tokens(llm, count):
    """New tokens of a batch whose sequences have 170, 150 and 130 tokens: two groups become old."""
    text = "".join(PROMPTS)
    ids = [llm.tokenizer(text)["input_ids"][20 * number :][: 170 - 20 * number] for number in range(count)]
    batch = llm.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    made = llm._generate(dict(batch), 50, {"do_sample": False, "eos_token_id": None})
    return made[:, 170:].tolist()


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
def test_steps_give_the_tokens_of_the_ordinary_path(demo, kv_cache):
    """A group is quantized one token earlier than by an update, which changes no token here."""
    with load(demo, kv_cache, steps=False) as ordinary, load(demo, kv_cache, steps=True) as steps:
        for count in (3, 1):
            assert tokens(steps, count) == tokens(ordinary, count)
        assert set(steps_of(steps)) == {3, 1}
        home = steps._generations.decoder._home
        held = sum(tensor.nbytes for layer in home.layers for one in layer for tensor in one.tensors())
        assert held == qv.estimate_vram(demo, kv_cache=kv_cache, **KNOBS_OF_ESTIMATE, **WORK).kv_cache


def test_several_answers_and_beams_keep_the_cache_whole(demo):
    """Repeated sequences go to buffers of the batch, and beams to the ordinary loop."""
    with load(demo, "int8", steps=False) as ordinary, load(demo, "int8", steps=True) as steps:
        prompt = PROMPTS[0]
        for options in ({"num_return_sequences": 3, "do_sample": True, "seed": 4}, {"num_beams": 3}):
            both = [llm.chat(prompt, max_new_tokens=12, **options) for llm in (ordinary, steps)]
            assert both[0] == both[1]


def test_a_cache_of_ones_own_goes_on_where_it_ended(demo):
    with load(demo, "int4", steps=True) as llm:
        ids = llm.tokenizer("".join(PROMPTS), return_tensors="pt")["input_ids"][:, :170]
        options = {"eos_token_id": None, "do_sample": False}
        whole = llm.model.generate(ids, max_new_tokens=60, past_key_values=llm.new_cache(max_length=300), **options)
        cache = llm.new_cache(max_length=300)
        assert isinstance(cache.layers[0], QuantizedGraphLayer)
        part = llm.model.generate(ids, max_new_tokens=20, past_key_values=cache, **options)
        assert cache.layers[0].in_buffers()
        rest = llm.model.generate(part, max_new_tokens=40, past_key_values=cache, **options)
        assert rest.tolist() == whole.tolist()


def test_kernels_of_its_own_are_needed(demo):
    with pytest.raises(qv.WorkloadError, match="captured=True with kv_cache='int8' needs kernels='fused', got kernels"):
        qv.estimate_vram(demo, kv_cache="int8", attention="fused", cache="preallocated", captured=True)
    with pytest.raises(qv.WorkloadError, match="compiled=True needs kv_cache='bf16', got kv_cache='int8'"):
        qv.estimate_vram(demo, kv_cache="int8", attention="fused", cache="preallocated", compiled=True)


# on a GPU


CAPTURED = {**KNOBS, "captured": True}


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", KV_FORMATS)
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_on_a_gpu_answers_are_right_and_memory_is_what_was_promised(demo, weights, kv_cache):
    work = {"prompt_len": 600, "max_new_tokens": 64}
    with qv.load(demo, profile="default", weights=weights, kv_cache=kv_cache, **CAPTURED, **work) as llm:
        assert all(step.graphs and step.scratch is not None for step in steps_of(llm).values())
        for example in ASKED:
            assert llm.chat(example.prompt, max_new_tokens=64, do_sample=False) == example.answer
        measured, promised = llm.report().measured, llm.plan.estimate
        assert measured["peak_allocated"] <= 1.01 * promised.peak_allocated
        assert measured["process_total"] <= 1.01 * promised.process_total


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", KV_FORMATS)
@pytest.mark.parametrize("padding", [0, 300])
def test_on_a_gpu_tokens_are_those_without_capture_up_to_ties(published, padding, kv_cache):
    ids = torch.randint(1_000, 100_000, (2, 700), generator=torch.Generator().manual_seed(3)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    work = {"batch_size": 2, "prompt_len": 700, "max_new_tokens": 50}
    options = {"max_new_tokens": 50, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = {}
    for captured in (False, True):
        knobs = {**KNOBS, "captured": captured}
        with qv.load(published, profile="default", weights="bf16", kv_cache=kv_cache, **knobs, **work) as llm:
            cache = llm.new_cache(max_length=750)
            made[captured] = llm.model.generate(ids, attention_mask=mask, **options, past_key_values=cache)
    expected, found = (made[captured].sequences[:, 700:] for captured in (False, True))
    logits = torch.stack(made[False].logits, dim=1)
    steps = 2**-7 * logits.abs().amax(-1)  # of bf16, at the largest logit
    for row in range(2):
        parted = (found[row] != expected[row]).nonzero()
        if len(parted):
            at = int(parted[0])
            assert logits[row, at].max() - logits[row, at, found[row, at]] <= 4 * steps[row, at], (row, at)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("kv_cache", KV_FORMATS)
def test_on_a_gpu_no_token_waits_and_nothing_grows(published, kv_cache):
    watch, work = Watch(), {"prompt_len": 512, "max_new_tokens": 220}
    with qv.load(published, profile="default", weights="nf4", kv_cache=kv_cache, **CAPTURED, **work) as llm:
        ids = torch.randint(1_000, 100_000, (1, 512)).cuda()
        options = {"max_new_tokens": 220, "eos_token_id": [151_643], "min_new_tokens": 220, "do_sample": False}
        try:
            cache = llm.new_cache(max_length=732)
            llm.model.generate(ids, past_key_values=cache, logits_processor=LogitsProcessorList([watch]), **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(watch.allocated) == 220
    assert len(set(watch.allocated[5:])) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", KV_FORMATS)
@pytest.mark.parametrize(("batch_size", "prompt_len"), [(1, 2_000), (4, 300)])
def test_on_a_gpu_the_peak_is_the_predicted_one(published, batch_size, prompt_len, kv_cache):
    work = {"batch_size": batch_size, "prompt_len": prompt_len, "max_new_tokens": 64}
    with qv.load(published, profile="default", weights="nf4", kv_cache=kv_cache, **CAPTURED, **work) as llm:
        report = llm.probe()
        for part in ("weights", "kv_cache", "peak_allocated"):
            promised, measured = getattr(report.estimate, part), report.measured[part]
            assert measured == pytest.approx(promised, rel=0.01), (part, promised, measured)
        before = torch.cuda.memory_allocated()
        llm.probe()
        assert torch.cuda.memory_allocated() == before
