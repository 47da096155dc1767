"""Decode steps: on the CPU as they are, to the tokens of the ordinary path; on a GPU captured, or compiled too."""

import gc
import weakref

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import qwen_vram as qv
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_cache import GraphCache
from qwen_vram.runtime.decoding.graph_decoder import Decoder, compiler_for, decoder_where_it_runs
from qwen_vram.runtime.decoding.layer import fused_decode_layer
from qwen_vram.runtime.offload.host_embedding import move_embedding_to_host
from tests.helpers.tiers import thinned

# torch's own, as it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

KNOBS = {"attention": "fused", "cache": "preallocated"}
NEW = 32  # more than the 28 of the first answer
WORK = {"batch_size": 4, "prompt_len": 600, "max_new_tokens": 220}
ASKED = [
    example
    for name in ("math", "recall", "table", "chinese")
    for example in examples(name, "held_out", seed=5, count=1)
]
PROMPTS = [example.prompt for example in ASKED]


def load(folder, weights, *, steps, backend=None, **work):
    llm = qv.load(folder, profile="default", weights=weights, progress=False, **KNOBS, **{**WORK, **work})
    if steps:
        # What the loader does on a GPU.
        decode_by_steps(llm.model)
        work = llm.plan.workload
        llm._generations.decoder = Decoder(
            llm.model, batch_size=work.batch_size, max_length=work.context_len, backend=backend
        )
    return llm


@pytest.fixture(scope="module")
def pairs(request):
    """The ordinary path and the one by steps, by format; each loaded once."""
    loaded = {}

    def pair(weights):
        if weights not in loaded:
            demo = request.getfixturevalue("demo")
            loaded[weights] = load(demo, weights, steps=False), load(demo, weights, steps=True)
        return loaded[weights]

    yield pair
    for both in loaded.values():
        for llm in both:
            llm.close()


def chats(llm, count):
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:count]]
    return [llm.tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in asked]


def sequences(llm, count, new=NEW, **options):
    """Token ids, past the prompts; a batch is padded."""
    inputs = llm.tokenizer(chats(llm, count), return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(3)
    return llm._generate(dict(inputs), new, options)[:, inputs["input_ids"].shape[1] :].tolist()


class Shift(LogitsProcessor):
    """Changes scores in place, as some processors do."""

    def __call__(self, input_ids, scores):
        scores[:, input_ids[0, -1] % 7 :: 7] += 1.5
        return scores


OPTIONS = [
    {"do_sample": False},
    {"do_sample": False, "eos_token_id": None},
    {"do_sample": False, "min_new_tokens": 30, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 1.5, "top_k": 0, "eos_token_id": None},
    {"do_sample": True, "top_k": 20, "top_p": 0.8},
    {"do_sample": False, "logits_processor": LogitsProcessorList([Shift()]), "eos_token_id": None},
    {"do_sample": False, "prefill_chunk_size": 48},
]


def steps_of(llm):
    """The steps that the decoder keeps for its own buffers, by batch."""
    decoder = llm._generations.decoder
    return decoder._steps[decoder._home]


@pytest.mark.parametrize("new", [NEW, pytest.param(210, marks=pytest.mark.full)])
@pytest.mark.parametrize(*thinned(1, options=OPTIONS, count=[1, 4]))
def test_steps_give_the_tokens_of_the_ordinary_path(pairs, count, options, new):
    ordinary, steps = pairs("fp32")
    expected = sequences(ordinary, count, new, **options)
    assert sequences(steps, count, new, **options) == expected
    assert count in steps_of(steps)


@pytest.mark.parametrize(*thinned(1, weights=["bf16", "nf4", "int4", "int8-wo", "fp8"], count=[1, 4]))
def test_every_format_runs_by_steps(pairs, weights, count):
    ordinary, steps = pairs(weights)
    assert sequences(steps, count, 16, do_sample=False) == sequences(ordinary, count, 16, do_sample=False)


@pytest.mark.parametrize(*thinned(1, kind=["untied", "tied", "qwen3"], knobs=[{"kernels": "fused"}, {}]), ids=str)
def test_every_model_runs_by_steps(request, kind, knobs):
    folder = request.getfixturevalue(kind)
    with load(folder, "fp32", steps=False, **knobs) as ordinary, load(folder, "fp32", steps=True, **knobs) as steps:
        assert (steps._generations.decoder._compiled()[0] is fused_decode_layer) == bool(knobs)
        for count in (1, 3):
            options = {"new": 16, "do_sample": False, "eos_token_id": None}
            assert sequences(steps, count, **options) == sequences(ordinary, count, **options)


@pytest.mark.parametrize(*thinned(1, weights=["fp32", "nf4", "int8-wo"], count=[1, 4]))
def test_a_table_on_the_host_runs_by_steps(demo, weights, count):
    """On a CPU a table is on the host anyhow: it is moved as the loader does it on a GPU."""
    with load(demo, weights, steps=False) as ordinary, load(demo, weights, steps=False) as llm:
        move_embedding_to_host(llm.model, llm.device)
        decode_by_steps(llm.model)
        llm._generations.decoder = Decoder(llm.model, batch_size=4, max_length=820, backend=None)
        assert sequences(llm, count, new=16, do_sample=False) == sequences(ordinary, count, new=16, do_sample=False)
        step = steps_of(llm)[count]
        assert step.embedded.shape == (count, llm.model.config.hidden_size)


def test_an_adapter_runs_by_steps(untied, adapter):
    with (
        load(untied, "fp32", steps=False, adapter=adapter) as ordinary,
        load(untied, "fp32", steps=False, adapter=adapter) as llm,
    ):
        base = llm.model.get_base_model()
        decode_by_steps(base)
        llm._generations.decoder = Decoder(base, batch_size=1, max_length=400, backend=None)
        expected = ordinary.generate("hello", max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert llm.generate("hello", max_new_tokens=16, do_sample=False, eos_token_id=None) == expected
        assert steps_of(llm)


def test_what_generate_returns_beside_the_tokens(pairs):
    found = []
    for llm in pairs("fp32"):
        inputs = llm.tokenizer(chats(llm, 1), return_tensors="pt")
        cache = llm.new_cache(max_length=500)
        output = llm.model.generate(
            **inputs, past_key_values=cache, max_new_tokens=40, do_sample=False, repetition_penalty=1.1,
            return_dict_in_generate=True, output_scores=True, output_logits=True,
        )  # fmt: skip
        assert output.past_key_values is cache
        found.append((output, cache.get_seq_length()))
    (plain, length), (ours, our_length) = found
    assert type(ours) is type(plain)
    assert torch.equal(ours.sequences, plain.sequences)
    assert our_length == length == plain.sequences.shape[1] - 1
    for name in ("scores", "logits"):
        assert (
            len(getattr(ours, name))
            == len(getattr(plain, name))
            == plain.sequences.shape[1] - inputs["input_ids"].shape[1]
        )
        for one, other in zip(getattr(ours, name), getattr(plain, name), strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_a_cache_goes_on_where_it_ended(pairs):
    """Two turns over one cache, the second with the whole conversation as its prompt."""
    found = []
    for llm in pairs("fp32"):
        cache, ids = llm.new_cache(max_length=500), llm.tokenizer(chats(llm, 1), return_tensors="pt")["input_ids"]
        for question in ("And 3 + 4?", "Why?"):
            ids = llm.model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
            more = llm.tokenizer(question, return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, more], dim=1)
        found.append(ids.tolist())
    assert found[0] == found[1]


def test_stop_strings_and_criteria_of_ones_own(pairs):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == self.token

    for options in ({"stop_strings": [" is", "。"]}, {"own": True}):
        found = []
        for llm in pairs("fp32"):
            extra = {"tokenizer": llm.tokenizer, **options}
            if extra.pop("own", False):
                extra = {"stopping_criteria": StoppingCriteriaList([After()])}
                extra["stopping_criteria"][0].token = sequences(llm, 1, do_sample=False, new=12)[0][5]
            inputs = llm.tokenizer(chats(llm, 1), return_tensors="pt")
            cache = llm.new_cache(max_length=500)
            found.append(
                llm.model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False, **extra)
            )
            assert cache.get_seq_length() == found[-1].shape[1] - 1
        assert torch.equal(*found)
        assert found[0].shape[1] < inputs["input_ids"].shape[1] + 40


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"eos_token_id": None}], ids=str)
def test_a_streamer_hears_every_token_once(pairs, options):
    _, llm = pairs("fp32")
    inputs, heard = llm.tokenizer(chats(llm, 1), return_tensors="pt"), Heard()
    cache = llm.new_cache(max_length=500)
    ids = llm.model.generate(
        **inputs, past_key_values=cache, max_new_tokens=60, do_sample=False, streamer=heard, **options
    )
    assert heard.tokens == ids[0].tolist()
    assert heard.ended


def test_chat_and_stream_agree_by_steps(pairs):
    _, llm = pairs("bf16")
    answer = llm.chat(PROMPTS[0], max_new_tokens=40, do_sample=False)
    assert "".join(llm.stream(PROMPTS[0], max_new_tokens=40, do_sample=False)) == answer
    stream = llm.stream(PROMPTS[0], max_new_tokens=200, do_sample=False, eos_token_id=None)
    next(stream)
    stream.close()
    assert llm.chat(PROMPTS[0], max_new_tokens=40, do_sample=False) == answer


def test_memory_stays_and_is_lent_to_one_cache_at_a_time(pairs):
    _, llm = pairs("fp32")
    expected = sequences(llm, 1, do_sample=False)
    home = llm._generations.decoder._home
    held = {one.data_ptr() for layer in home.layers for one in layer}
    ids = llm.tokenizer(chats(llm, 1), return_tensors="pt")["input_ids"]
    mine = llm.new_cache(max_length=500)
    first = llm.model.generate(ids, past_key_values=mine, max_new_tokens=20, do_sample=False)
    assert mine.layers[0].keys.data_ptr() in held
    # Meanwhile another generation runs elsewhere, and leaves this one alone.
    assert sequences(llm, 1, do_sample=False) == expected
    other = llm.new_cache(max_length=500)
    llm.model.generate(ids, past_key_values=other, max_new_tokens=2, do_sample=False)
    assert other.layers[0].keys.data_ptr() not in held
    again = llm.model.generate(first, past_key_values=mine, max_new_tokens=20, do_sample=False)
    assert again[0, ids.shape[1] :].tolist()[: len(expected[0])] == expected[0][: again.shape[1] - ids.shape[1]]
    del mine, other
    gc.collect()
    assert sequences(llm, 1, do_sample=False) == expected
    assert llm._generations.decoder._home is home
    assert llm._generations.decoder._holder() is None


def test_a_longer_generation_gets_more_memory_and_the_planned_comes_back(demo):
    with load(demo, "fp32", steps=True, batch_size=1, prompt_len=300, max_new_tokens=40) as llm:
        decoder = llm._generations.decoder
        sequences(llm, 1, new=40, do_sample=False)
        assert (decoder._home.batch_size, decoder._home.max_length) == (1, 340)
        assert llm.report().measured["kv_cache"] == llm.report().estimate.kv_cache == llm.plan.estimate.kv_cache
        sequences(llm, 3, new=40, do_sample=False)
        assert llm.report().measured["kv_cache"] == llm.report().estimate.kv_cache > llm.plan.estimate.kv_cache
        assert decoder._home is None  # its memory is not in the plan
        sequences(llm, 1, new=40, do_sample=False)
        assert decoder._home.size == (1, 340)
        llm.close()
        assert decoder._home is None


def test_a_full_cache_says_so(pairs):
    for llm in pairs("fp32"):
        inputs = llm.tokenizer(chats(llm, 1), return_tensors="pt")
        length = inputs["input_ids"].shape[1] + 8
        with pytest.raises(ValueError, match=f"the cache holds {length} tokens and was given {length + 1}"):
            llm.model.generate(
                **inputs, past_key_values=llm.new_cache(max_length=length), max_new_tokens=20, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip


def test_what_steps_cannot_do_goes_the_ordinary_way_and_says_so(pairs, caplog):
    ordinary, llm = pairs("fp32")
    for options, text in (
        ({"num_beams": 3}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
    ):
        expected = sequences(ordinary, 1, new=24, do_sample=False, **options)
        caplog.clear()
        assert sequences(llm, 1, new=24, do_sample=False, **options) == expected, options
        sequences(llm, 1, new=4, do_sample=False, **options)
        assert caplog.text.count(f"{text}: this generation runs without compiled decode steps") <= 1


def test_outputs_that_steps_do_not_keep_go_the_ordinary_way_and_say_so(pairs, caplog):
    ordinary, llm = pairs("fp32")
    inputs = llm.tokenizer(chats(llm, 1), return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    expected = ordinary.model.generate(**inputs, **options)
    found = llm.model.generate(**inputs, **options, past_key_values=llm.new_cache(max_length=500))
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.hidden_states) == len(expected.hidden_states) > 1
    text = "output_attentions or output_hidden_states: this generation runs without compiled decode steps"
    assert caplog.text.count(text) <= 1


def test_padding_at_the_end_goes_the_ordinary_way(pairs, caplog):
    _, llm = pairs("fp32")
    ids = llm.tokenizer(chats(llm, 1), return_tensors="pt")["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    plain = llm.model.generate(ids, **options)
    assert torch.equal(llm.model.generate(ids, past_key_values=llm.new_cache(max_length=500), **options), plain)
    assert "padding that is not at the front: this generation runs without compiled decode steps" in caplog.text


def test_the_model_is_still_a_model_of_transformers(pairs, tmp_path):
    _, llm = pairs("nf4")
    assert type(llm.model).__name__ == "Qwen2ForCausalLM"
    assert isinstance(llm.model, type(llm.model).__mro__[2])
    expected = sequences(llm, 1, do_sample=False)
    llm.save_quantized(tmp_path / "saved", progress=False)
    with qv.load(tmp_path / "saved", progress=False, **KNOBS) as again:
        assert sequences(again, 1, do_sample=False) == expected


def test_all_layers_share_one_compiled_function_whatever_the_length(demo):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    with load(demo, "bf16", steps=True, backend=count) as llm, load(demo, "bf16", steps=True) as plain:
        expected = sequences(plain, 1, do_sample=False)
        assert sequences(llm, 1, do_sample=False) == expected
        assert len(graphs) == 2  # a layer, and the end
        cache = llm.new_cache(max_length=333)
        keep = llm.new_cache(max_length=300)
        ids = llm.tokenizer(chats(llm, 1), return_tensors="pt")["input_ids"]
        for one in (keep, cache):
            llm.model.generate(ids, past_key_values=one, max_new_tokens=4, do_sample=False)
        assert cache.lease.buffers is not llm._generations.decoder._home
        assert len(graphs) == 2
        sequences(llm, 4, do_sample=False)
        assert len(graphs) == 4
        assert llm.compile_seconds > 0


def test_closing_lets_go_of_model_memory_and_code(demo):
    llm = load(demo, "bf16", steps=True, backend=lambda graph, inputs: graph)
    llm.chat("hello", max_new_tokens=4)
    home = llm._generations.decoder._home
    alive = [weakref.ref(one) for one in (llm.model.model.layers[0].mlp, home, home.layers[0][0])]
    assert all(one() is not None for one in alive)
    del home
    llm.close()
    assert [one() for one in alive] == [None] * 3


def test_a_step_that_cannot_be_compiled_runs_as_it_is(demo, caplog):
    def fail(graph, inputs):
        raise NotImplementedError("no kernel for this")

    with load(demo, "bf16", steps=True, backend=fail) as llm, load(demo, "bf16", steps=True) as plain:
        assert sequences(llm, 1, do_sample=False) == sequences(plain, 1, do_sample=False)
        assert llm._generations.decoder.backend is None
    assert "the decode step is captured without being compiled" in caplog.text
    assert "no kernel for this" in caplog.text


@pytest.mark.full
def test_inductor_compiles_a_step(demo, monkeypatch):
    """The real compiler, on the CPU: rounding differs, answers do not."""
    # In this process: others would import torch anew.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    # Without the CPU's vectors: torch asks for each kind of them by a compilation of its own.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    with load(demo, "bf16", steps=True, backend="inductor") as llm, load(demo, "bf16", steps=True) as plain:
        assert sequences(llm, 1, do_sample=False) == sequences(plain, 1, do_sample=False)
        assert llm._generations.decoder.backend == "inductor"


def test_a_missing_compiler_is_said(monkeypatch, caplog):
    monkeypatch.setattr("qwen_vram.planning.capacity.compiler.find_spec", lambda name: None)
    monkeypatch.setattr("qwen_vram.planning.capacity.compiler.which", lambda name: "/usr/bin/cc")
    assert compiler_for(torch.device("cuda")) is None
    assert "compiled=True without Triton: decode steps are captured as a CUDA graph, but not compiled" in caplog.text
    monkeypatch.setattr("qwen_vram.planning.capacity.compiler.find_spec", lambda name: object())
    assert compiler_for(torch.device("cuda")) == "inductor"
    monkeypatch.setattr("qwen_vram.planning.capacity.compiler.which", lambda name: None)
    assert compiler_for(torch.device("cuda")) is None
    assert "compiled=True without a C compiler" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), None])
def test_a_machine_that_captures_nothing_launches_steps_one_by_one(untied, monkeypatch, caplog, error):
    def prepare(self, batch_size, max_length):
        raise error or torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "prepare", prepare)
    with load(untied, "fp32", steps=False) as llm:
        expected = llm.chat("hello", max_new_tokens=8, do_sample=False)
        work = (llm.model, llm.plan.workload, lambda steps, desc: steps)
        if error is None:
            with pytest.raises(torch.OutOfMemoryError):
                decoder_where_it_runs(*work, compiled=False)
            return
        closed = []
        monkeypatch.setattr(Decoder, "close", lambda self: closed.append(self))
        assert decoder_where_it_runs(*work, compiled=False) is None
        assert len(closed) == 1  # its stream is free for the next model
        assert "launched one by one, which is slower, for they cannot be captured here: operation not" in caplog.text
        with pytest.raises(RuntimeError, match="not permitted"):
            decoder_where_it_runs(*work, compiled=True)
        assert llm.chat("hello", max_new_tokens=8, do_sample=False) == expected


# on a GPU


SPEED = {"attention": "fused", "cache": "static", "compiled": True, "progress": False}
CAPTURED = {"attention": "fused", "kernels": "fused", "cache": "preallocated", "captured": True, "progress": False}
KINDS = {"compiled": SPEED, "captured": CAPTURED, "captured, table on the host": {**CAPTURED, "embeddings": "host"}}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int4", "int8-wo", "fp8"])
def test_on_a_gpu_answers_are_right_and_memory_is_what_was_promised(demo, weights, kind):
    work = {"prompt_len": 600, "max_new_tokens": 64}
    with qv.load(demo, profile="default", weights=weights, **KINDS[kind], **work) as llm:
        assert llm.compile_seconds > 0
        assert llm._generations.decoder.backend == (compiler_for(llm.device) if kind == "compiled" else None)
        assert all(step.graphs for step in steps_of(llm).values())
        for example in ASKED:
            assert llm.chat(example.prompt, max_new_tokens=64, do_sample=False) == example.answer
        # Segments that earlier questions left stay reserved: the promise is the plan's, for its longest prompt.
        measured, promised = llm.report().measured, llm.plan.estimate
        assert measured["peak_allocated"] <= 1.01 * promised.peak_allocated
        assert measured["process_total"] <= 1.01 * promised.process_total


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 300])
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int4"])
def test_on_a_gpu_tokens_are_the_ordinary_paths_up_to_ties(published, weights, padding, kind):
    """Random weights have near ties: tokens may part where the ordinary path's two logits are within rounding."""
    ids = torch.randint(1_000, 100_000, (2, 700), generator=torch.Generator().manual_seed(3)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    work = {"batch_size": 2, "prompt_len": 700, "max_new_tokens": 24}
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with qv.load(published, profile="default", weights=weights, **KINDS[kind], **work) as llm:
        for rows in ([0], [0, 1]):
            inputs = {"input_ids": ids[rows], "attention_mask": mask[rows]}
            plain = llm.model.generate(**inputs, **options)
            ours = llm.model.generate(**inputs, **options, past_key_values=llm.new_cache(max_length=724))
            assert isinstance(ours.past_key_values, GraphCache)
            expected, logits = plain.sequences[:, 700:], torch.stack(plain.logits, dim=1)
            found = ours.sequences[:, 700:]
            steps = 2**-7 * logits.abs().amax(-1)  # of bf16, at the largest logit
            del ours
            for row in range(len(rows)):
                parted = (found[row] != expected[row]).nonzero()
                if len(parted):
                    at = int(parted[0])
                    gap = logits[row, at].max() - logits[row, at, found[row, at]]
                    assert gap <= 4 * steps[row, at], (rows, row, at)


class Watch(LogitsProcessor):
    """From the second token on nothing may wait for the GPU, and nothing may stay allocated."""

    def __init__(self):
        self.allocated = []

    def __call__(self, input_ids, scores):
        if self.allocated:
            torch.cuda.set_sync_debug_mode("error")
        self.allocated.append(torch.cuda.memory_allocated())
        return scores


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("kind", ["compiled", "captured"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int4"])
def test_on_a_gpu_no_token_waits_and_nothing_grows(published, weights, do_sample, kind):
    watch, work = Watch(), {"prompt_len": 512, "max_new_tokens": 220}
    with qv.load(published, profile="default", weights=weights, **KINDS[kind], **work) as llm:
        ids = torch.randint(1_000, 100_000, (1, 512)).cuda()
        cache = llm.new_cache(max_length=732)
        options = {"max_new_tokens": 220, "eos_token_id": [151_643], "min_new_tokens": 220, "do_sample": do_sample}
        try:
            llm.model.generate(ids, past_key_values=cache, logits_processor=LogitsProcessorList([watch]), **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(watch.allocated) == 220
    assert len(set(watch.allocated[5:])) <= 2  # a scratch tensor more or less


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "prompt_len"), [(1, 512), (4, 300)])
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int4"])
def test_on_a_gpu_the_peak_is_the_predicted_one(published, weights, batch_size, prompt_len, kind):
    work = {"batch_size": batch_size, "prompt_len": prompt_len, "max_new_tokens": 64}
    with qv.load(published, profile="default", weights=weights, **KINDS[kind], **work) as llm:
        report = llm.probe()
        for part in ("weights", "kv_cache", "peak_allocated"):
            promised, measured = getattr(report.estimate, part), report.measured[part]
            assert measured == pytest.approx(promised, rel=0.01), (part, promised, measured)
        before = torch.cuda.memory_allocated()
        llm.probe()
        assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_on_a_gpu_closing_gives_everything_back(demo):
    before = torch.cuda.memory_allocated()
    llm = qv.load(demo, profile="default", prompt_len=300, max_new_tokens=40, **SPEED)
    llm.chat("What is 12 + 30?", max_new_tokens=16, do_sample=False)
    llm.close()
    # cuBLAS keeps a workspace for each stream; another model's steps use it again.
    after = torch.cuda.memory_allocated()
    assert after - before <= 2 * 34_603_008
    with qv.load(demo, profile="default", prompt_len=300, max_new_tokens=40, **SPEED) as llm:
        llm.chat("What is 12 + 30?", max_new_tokens=16, do_sample=False)
    assert torch.cuda.memory_allocated() == after
