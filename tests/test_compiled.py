"""Compiled decode steps: the same tokens as without, by `transformers`' own rules, in the memory that was promised.

On the CPU the steps and their loop run as they are; on a GPU they are compiled and captured.
"""

from threading import Thread

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

import qwen_vram as qv
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.decode_loop import decode_by_steps
from qwen_vram.runtime.decode_room import RoomCache
from qwen_vram.runtime.decoder import Decoder

PROMPTS = [one.prompt for name in ("math", "recall") for one in examples(name, "held_out", seed=5, count=2)]
FUSED = {"profile": "default", "attention": "fused", "cache": "preallocated", "progress": False}
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def plain(demo, request):
    with qv.load(demo, weights=request.param, **FUSED) as llm:
        yield llm


@pytest.fixture(scope="module")
def stepped(demo, plain):
    """The same model whose `generate` runs decode steps, neither compiled nor captured."""
    with qv.load(demo, weights=plain.plan.profile.weights, **FUSED) as llm:
        decode_by_steps(llm.model)
        llm._generations.decoder = Decoder(llm.model, batch_size=4, max_length=900, backend=None)
        yield llm


@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS], ids=["one", "padded"])
def test_greedy_tokens_are_the_same(plain, stepped, prompts):
    # Sums are in another order, which bf16 shows where an answer is long over.
    new = 220 if plain.plan.profile.weights == "fp32" else 24
    answers = [llm.generate(prompts, max_new_tokens=new, **GREEDY) for llm in (plain, stepped)]
    assert answers[0] == answers[1]
    assert stepped._generations.decoder._home.steps.keys() >= {1 if prompts == PROMPTS[0] else 4}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 30},
        {"do_sample": False, "max_new_tokens": 1},
        {"do_sample": False, "max_new_tokens": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
    ],
    ids=str,
)
def test_whatever_chooses_tokens_does_so_as_before(plain, stepped, options):
    answers = []
    for llm in (plain, stepped):
        torch.manual_seed(3)
        answers.append(llm.generate(PROMPTS[:2], **{"max_new_tokens": 60, **options}))
    assert answers[0] == answers[1]


def test_the_end_of_sequences_is_padded_and_cut_as_before(plain, stepped):
    found = []
    for llm in (plain, stepped):
        inputs = llm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
        length = inputs["input_ids"].shape[1] + 100
        output = llm.model.generate(
            **inputs,
            max_new_tokens=100,
            do_sample=False,
            past_key_values=llm.new_cache(max_length=length),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        found.append(output)
    assert isinstance(found[1].past_key_values, RoomCache)
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert found[0].sequences.shape[1] < inputs["input_ids"].shape[1] + 100, "nothing ended early"
    for name in ("scores", "logits"):
        assert len(found[0][name]) == len(found[1][name])
        assert all(torch.allclose(a, b, atol=0.3, rtol=0.05) for a, b in zip(found[0][name], found[1][name]))
    assert found[0].past_key_values.get_seq_length() == found[1].past_key_values.get_seq_length()


class AfterTen(StoppingCriteria):
    def __init__(self, prompt_len):
        self.length = prompt_len + 10

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_criterion_of_ones_own_stops_it_and_a_streamer_gets_every_token(plain, stepped):
    found = []
    for llm in (plain, stepped):
        inputs = llm.tokenizer(PROMPTS[0], return_tensors="pt")
        streamer = TextIteratorStreamer(llm.tokenizer, skip_prompt=True, timeout=60)
        stop = StoppingCriteriaList([AfterTen(inputs["input_ids"].shape[1])])
        cache = llm.new_cache(max_length=200)
        options = {
            "max_new_tokens": 50,
            "stopping_criteria": stop,
            "streamer": streamer,
            "past_key_values": cache,
            **GREEDY,
        }
        thread = Thread(target=lambda llm=llm, inputs=inputs, options=options: found.append(
            llm.model.generate(**inputs, **options)))  # fmt: skip
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert found[-1].shape[1] == inputs["input_ids"].shape[1] + 10
        assert text == llm.tokenizer.decode(found[-1][0, -10:])
    assert torch.equal(*found)


def test_beams_go_the_plain_way_and_it_says_so(plain, stepped, caplog):
    answers = [llm.generate(PROMPTS[0], num_beams=2, max_new_tokens=20, do_sample=False) for llm in (plain, stepped)]
    assert answers[0] == answers[1]


def test_two_caches_at_a_time_do_not_disturb_each_other(plain, stepped):
    inputs = [stepped.tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS[:2]]
    caches = [stepped.new_cache(max_length=800) for _ in inputs]
    with torch.no_grad():
        for one, cache in zip(inputs, caches):
            stepped.model(**one, past_key_values=cache)
    assert caches[0].claim.room is not caches[1].claim.room
    for cache in caches:
        cache.release()


@pytest.mark.parametrize(
    "knobs",
    [
        {"attention": "sdpa"},
        {"kv_cache": "int8"},
        {"kv_device": "host"},
        {"embeddings": "host"},
        {"streamed_layers": 2},
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused_by_name(knobs):
    (knob,) = knobs
    with pytest.raises(qv.WorkloadError, match=rf"compiled=True needs {knob}="):
        qv.estimate_vram("Qwen2.5-7B", compiled=True, **{"attention": "fused", "cache": "preallocated", **knobs})


def test_on_the_cpu_it_is_refused(demo):
    with pytest.raises(qv.NotSupportedError, match="compiled=True runs on a GPU, as a CUDA graph"):
        qv.load(demo, **FUSED, compiled=True)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int4"])
def test_on_a_gpu_tokens_are_the_same_up_to_ties_and_memory_is_as_promised(wide, weights):
    work = {"prompt_len": 700, "max_new_tokens": 220, "batch_size": 1}
    torch._C._cuda_clearCublasWorkspaces()
    with qv.load(wide, weights=weights, **FUSED, **work) as llm:
        before = llm.generate(PROMPTS[0], max_new_tokens=40, **GREEDY)
    with qv.load(wide, weights=weights, **FUSED, **work, compiled=True) as llm:
        after = llm.generate(PROMPTS[0], max_new_tokens=40, **GREEDY)
        assert after[:20] == before[:20]
        report = llm.probe()
        promised, measured = report.estimate.peak_allocated, report.measured["peak_allocated"]
        assert measured == pytest.approx(promised, rel=0.01, abs=2**21)
        allocated = []
        for _ in range(3):
            llm.generate(PROMPTS[0], max_new_tokens=200, **GREEDY)
            allocated.append(torch.cuda.memory_allocated())
        assert len(set(allocated)) == 1
