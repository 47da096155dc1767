"""Streams of tokens: a request is checked before anything runs, and its tokens are those of `chat` and `generate`."""

import gc
import threading

import pytest
import torch

import qwen_vram as qv
from qwen_vram.runtime.generation.token_stream import LogprobRows
from tests.runtime.scheduling.test_callers import load

ASKED = "What is 96 * 9?"


@pytest.fixture(scope="module")
def llm(demo):
    with qv.load(demo, profile="default", progress=False, prompt_len=120, max_new_tokens=60) as loaded:
        yield loaded


def text_of(llm, tokens):
    return llm.tokenizer.decode([token.id for token in tokens], skip_special_tokens=True)


def test_the_tokens_are_those_of_chat_and_of_generate(llm):
    stream = llm.tokens(ASKED)
    tokens = list(stream)
    assert text_of(llm, tokens) == llm.chat(ASKED)
    assert stream.is_end(tokens[-1])
    assert stream.finish_reason == "stop"
    assert not any(stream.is_end(token) or token.top or token.logprob is not None for token in tokens[:-1])
    plain = llm.tokens(prompt="The code of", max_new_tokens=5)
    assert text_of(llm, plain) == llm.generate("The code of", max_new_tokens=5)
    sampled = {"temperature": 1.5, "seed": 7, "max_new_tokens": 20}
    assert text_of(llm, llm.tokens(ASKED, **sampled)) == llm.chat(ASKED, **sampled)


def test_it_counts_the_prompt_and_knows_its_limit(llm):
    stream = llm.tokens(ASKED, system="Answer.", max_new_tokens=3)
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": ASKED}]
    rendered = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert stream.prompt_tokens == len(rendered)
    assert (len(list(stream)), stream.finish_reason) == (3, "length")
    assert llm.tokens(ASKED).max_new_tokens == 60


def test_log_probabilities_are_those_of_a_forward_pass(llm):
    tokens = list(llm.tokens(ASKED, logprobs=3, temperature=0))
    sampled = list(llm.tokens(ASKED, logprobs=3, temperature=12.0, seed=1, max_new_tokens=8))
    start = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": ASKED}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    for made in (tokens, sampled):
        ids = torch.tensor([[token.id for token in made]])
        with torch.no_grad():
            logits = llm.model(torch.cat([start, ids], dim=1)).logits[0, start.shape[1] - 1 : -1].float()
        expected = logits.log_softmax(dim=-1)
        for row, token in zip(expected, made):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=0.15)  # bf16, in other shapes
            assert len(token.top) == 3
            assert dict(token.top)[int(row.argmax())] == pytest.approx(float(row.max()), abs=0.15)
    assert all(token.top[0] == (token.id, token.logprob) for token in tokens)
    assert any(token.top[0][0] != token.id for token in sampled)


def test_rows_wait_for_tokens_that_arrive_a_step_late():
    """On a GPU a token arrives after the next step's logits."""
    rows, logits = LogprobRows(1), torch.tensor([[[0.0, 1.0]], [[3.0, 0.0]]])
    for one in logits:
        assert rows(torch.zeros(1, 1), one) is one
    first, second = rows.token(0), rows.token(0)
    assert first.logprob == pytest.approx(-1.3133, abs=1e-4)
    assert (first.top[0][0], second.top[0][0]) == (1, 0)


def test_tokens_of_captured_steps_arrive_late_and_are_the_same(demo, llm):
    """On a GPU the loop reads each token one step late; here the same loop runs without a capture."""
    expected = list(llm.tokens(ASKED, logprobs=2))
    with load(demo, "steps") as stepped:
        made = list(stepped.tokens(ASKED, logprobs=2))
        assert [token.id for token in made] == [token.id for token in expected]
        for one, other in zip(made, expected):
            assert one.logprob == pytest.approx(other.logprob, abs=0.15)
            assert one.top[0][0] == other.top[0][0]
        stream = stepped.tokens(ASKED, logprobs=0, until=lambda token: token.id == expected[3].id)
        assert [token.id for token in stream] == [token.id for token in expected[:4]]
        assert stream.finish_reason == "stop"
        limited = stepped.tokens(ASKED, max_new_tokens=5)
        assert (len(list(limited)), limited.finish_reason) == (5, "length")


def test_an_answer_ends_with_the_token_that_until_accepts(llm):
    seen = []
    stream = llm.tokens(ASKED, until=lambda token: len(seen) == 3 or seen.append(threading.current_thread()))
    assert len(list(stream)) == 4
    assert stream.finish_reason == "stop"
    assert all(thread.name == "qwen-vram runner" for thread in seen)

    def broken(token):
        raise RuntimeError("from until")

    with pytest.raises(RuntimeError, match="from until"):
        list(llm.tokens(ASKED, until=broken))
    assert llm.chat(ASKED, max_new_tokens=2)


def test_stop_does_not_wait_and_frees_the_turn(llm):
    gate, held = threading.Event(), threading.Event()

    def wait(token):
        held.set()
        return not gate.wait(30)

    stream = llm.tokens(ASKED, until=wait)
    next(stream)
    held.wait(30)
    stream.stop()  # returns although the generation is inside `until`
    gate.set()
    assert list(stream) == []
    assert llm.chat(ASKED, max_new_tokens=2)


def test_a_request_is_refused_before_it_waits(llm):
    before = llm.report().to_dict()
    blocked = llm.tokens(ASKED)
    for request, message in (
        ({}, "pass either a message or a prompt"),
        ({"message": "a", "prompt": "b"}, "pass either a message or a prompt"),
        ({"prompt": ""}, "prompt must be a text"),
        ({"message": "hi " * 5000}, "past the model's max_position_embeddings 4096"),
        ({"message": "hi", "logprobs": -1}, "whole number of alternatives from 0 to 100, got -1"),
        ({"message": "hi", "logprobs": True}, "whole number of alternatives from 0 to 100, got True"),
        ({"message": "hi", "num_return_sequences": 2, "do_sample": True}, "gives one answer"),
        ({"prompt": "hi", "num_beams": 2}, "gives one answer"),
    ):
        with pytest.raises(qv.WorkloadError, match=message):
            llm.tokens(**request)
    del blocked  # never started, so it does not wait
    gc.collect()
    assert llm.report().to_dict() == before


def test_a_request_that_does_not_fit_is_refused_with_the_bytes(demo):
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.load(demo, profile="default", device="cpu", ram=2**20, prompt_len=64, max_new_tokens=16)
    ram = caught.value.needed_bytes + 2**20
    with qv.load(demo, profile="default", device="cpu", ram=ram, prompt_len=64, max_new_tokens=16) as small:
        assert list(small.tokens(ASKED, max_new_tokens=2))
        with pytest.raises(qv.DoesNotFitError) as refused:
            small.tokens("hi " * 1500)
    assert refused.value.needed_bytes > refused.value.budget_bytes == ram
