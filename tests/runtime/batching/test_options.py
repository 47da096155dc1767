"""Options of requests that run together: each request has its own, and gets the answer of the same call alone."""

import time
from functools import partial

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, MaxTimeCriteria, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import qwen_vram as qv
from tests.helpers.batches import ASKED, GREEDY, check_whole, load_alone, load_batched

GREEDILY = {"do_sample": False}
OPTIONS = [
    GREEDILY,
    {"seed": 1, "temperature": 4.0, "top_k": 0},
    {"seed": 1, "temperature": 8.0, "top_k": 5},
    {"seed": 3, "temperature": 9.0, "top_k": 0, "top_p": 0.9},
    {"seed": 4, "temperature": 9.0, "top_k": 0, "min_p": 0.01},
    {"seed": 5, "temperature": 6.0, "top_k": 50, "repetition_penalty": 1.2},
    {**GREEDILY, "repetition_penalty": 3.0},
    {**GREEDILY, "no_repeat_ngram_size": 1},
    {**GREEDILY, "min_new_tokens": 12, "max_new_tokens": 14},
    {**GREEDILY, "eos_token_id": None},
    {**GREEDILY, "stop_strings": ["9 =", "one"]},
    {"seed": 6, "temperature": 6.0, "top_k": 0, "num_return_sequences": 3},
    {"seed": 7, "temperature": 6.0, "top_k": 8, "typical_p": 0.9, "epsilon_cutoff": 1e-4},
]


@pytest.fixture(scope="module")
def alone(demo):
    with load_alone(demo, weights="fp32") as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(demo):
    with load_batched(demo, most=4, weights="fp32", prefill_chunk_size=48) as llm:
        yield llm


def test_requests_with_different_options_run_together(alone, llm):
    short = {"max_new_tokens": 8}
    words = alone.tokenizer(["96", " =", "="], add_special_tokens=False)["input_ids"]
    options = [*OPTIONS, {**GREEDILY, "bad_words_ids": words}, {**GREEDILY, "suppress_tokens": words[0]}]
    expected = [alone.chat(ASKED[0], **{**short, **one}) for one in options]
    futures = [llm.submit(ASKED[0], **{**short, **one}) for one in options]
    for asked, future, answer in zip(options, futures, expected, strict=True):
        assert future.result() == answer, asked
    assert len({str(one) for one in expected}) >= 12
    several = expected[11]
    assert len(several) == len(set(several)) == 3
    check_whole(llm)


def calls(llm, messages, options):
    return [
        llm.chat(messages, **options),
        llm.generate(["The code of", "Alpha", "One two three four"], **options),
        "".join(llm.stream(ASKED[0], **options)),
        [token.id for token in llm.tokens(prompt="The code of", **options)],
    ]


def test_each_call_has_its_batched_form(alone, llm):
    sampled = {"seed": 9, "temperature": 5.0, "top_k": 0, "max_new_tokens": 6}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED[2]}]
    for options in (GREEDY, sampled):
        assert calls(llm, messages, options) == calls(alone, messages, options)
    several = {**sampled, "num_return_sequences": 2}
    assert llm.generate(["The code", "A"], **several) == alone.generate(["The code", "A"], **several)
    text = alone.chat(messages, **sampled)
    assert llm.submit(messages, **sampled).result() == text
    assert llm.submit(ASKED[2], system="Be brief.", **sampled).result() == text
    assert llm.submit(prompt="The code of", **GREEDY).result() == alone.generate("The code of", **GREEDY)
    check_whole(llm)


def test_unseeded_draws_differ_and_leave_a_seeded_answer_alone(alone, llm):
    free = {"temperature": 5.0, "top_k": 0, "max_new_tokens": 8}
    expected = alone.chat(ASKED[0], seed=2, **free)
    others = [llm.submit(ASKED[0], **free) for _ in range(3)]
    seeded = llm.submit(ASKED[0], seed=2, **free)
    others += [llm.submit(ASKED[0], **free) for _ in range(3)]
    assert seeded.result() == expected
    assert len({one.result() for one in others}) == 6
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    assert llm.chat(ASKED[0], seed=2, **free) == expected
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tokens_have_the_log_probabilities_of_the_call_alone(alone, llm):
    asked = {"logprobs": 3, "seed": 4, "temperature": 4.0, "top_k": 0, "max_new_tokens": 8}
    streams = [llm.tokens(text, **asked) for text in ASKED[:3]]
    firsts = [next(stream) for stream in streams]  # all three run
    for text, stream, first in zip(ASKED, streams, firsts):
        made, expected = [first, *stream], list(alone.tokens(text, **asked))
        assert [one.id for one in made] == [one.id for one in expected]
        for one, other in zip(made, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [number for number, _ in one.top] == [number for number, _ in other.top]
        assert stream.finish_reason == ("stop" if stream.is_end(made[-1]) else "length")
    stream = llm.tokens(ASKED[0], until=lambda token: token.id == firsts[0].id, **asked)
    assert [token.id for token in stream] == [firsts[0].id]


class Shift(LogitsProcessor):
    """Changes scores in place, by the newest token."""

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1
        scores[:, input_ids[0, -1] % 7 :: 7] += 1.5
        return scores


class Counts(StoppingCriteria):
    """Ends after some tokens."""

    def __init__(self, most):
        self.most, self.seen = most, []

    def __call__(self, input_ids, scores, **others):
        self.seen.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(self.seen) >= self.most)


class Kept(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def test_processors_criteria_and_streamers_of_the_caller_see_their_own_request(alone, llm):
    found = []
    for one in (alone, llm):
        made = []
        for text in ASKED[:4]:
            counts, kept = Counts(5), Kept()
            own = {"logits_processor": [Shift()], "stopping_criteria": [counts], "streamer": kept}
            settings = {**own, **GREEDILY, "max_new_tokens": 9, "eos_token_id": None}
            made.append((one.submit(text, **settings), counts, kept))
        found.append([(future.result(), counts.seen, kept.got, kept.ended) for future, counts, kept in made])
    assert found[0] == found[1]
    assert all(len(seen) == 5 and ended == 1 for _, seen, _, ended in found[1])


def test_a_conversation_keeps_its_messages_and_feeds_all_of_them(alone, llm):
    said = []
    for one in (alone, llm):
        chat = one.conversation(system="Be brief.", **GREEDY)
        said.append([chat.say(text) for text in ("What is 7 * 8?", "What is 12 + 30?")])
        said[-1].append("".join(chat.stream("What is 61 - 14?")))
        assert len(chat.messages) == 7
    assert said[0] == said[1]
    check_whole(llm)


def said_of(call):
    with pytest.raises(qv.QwenVramError) as caught:
        call()
    return type(caught.value), str(caught.value)


def submitted(llm, **options):
    return llm.submit(ASKED[0], **options).result()


def test_options_that_transformers_refuses_have_the_same_refusal(alone, llm):
    """Except for those that `generate` finds while it runs, a request is refused before it waits."""
    for options in (
        {"bad_words_ids": []},
        {"sequence_bias": {}},
        {"sequence_bias": {(10**8,): 1.0}},
        {"logits_processor": 3},
        {"temperature": -1.0},
        {"seed": -1},
        {"no_such_option": 1},
        {"output_scores": True},
        {"use_cache": False},
        {"guidance_scale": 2.0},
    ):
        expected = said_of(partial(alone.chat, ASKED[0], max_new_tokens=3, **options))
        assert said_of(partial(submitted, llm, max_new_tokens=3, **options)) == expected
    assert llm.chat(ASKED[0], **GREEDY) == alone.chat(ASKED[0], **GREEDY)
    check_whole(llm)


@pytest.mark.parametrize(
    ("options", "knob", "text"),
    [
        ({"num_beams": 2}, "num_beams", "the generation mode 'beam_search' is not supported with cache='paged', which"),
        ({"prompt_lookup_num_tokens": 2}, "num_beams", "the generation mode 'assisted_generation' is not supported"),
        ({"negative_prompt_ids": [1]}, "negative_prompt_ids", "the option 'negative_prompt_ids' is not supported"),
        ({"token_healing": True}, "token_healing", "the option 'token_healing' is not supported with cache='paged'"),
        (
            {"prefill_chunk_size": 8},
            "prefill_chunk_size",
            "prefill_chunk_size is not supported with cache='paged', whose",
        ),
        ({"cache_implementation": "static"}, "cache_implementation", "pages are the only cache; load without concurr"),
        ({"past_key_values": DynamicCache()}, "past_key_values", "past_key_values is not supported with cache='paged'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_pages_exclude_are_refused_by_name(llm, options, knob, text):
    for call in (llm.submit, llm.chat):
        with pytest.raises(qv.NotSupportedError, match=text) as caught:
            call(ASKED[0], max_new_tokens=3, **options)
        assert caught.value.knob == knob
    check_whole(llm)


def test_the_time_of_max_time_begins_with_the_request_and_not_with_its_wait(llm):
    made = llm._prompts.of_texts(llm.model, ["hi"], 3, {"max_time": 50.0})
    (request,) = llm._generations.job(lambda: llm.model, made.inputs, 3, made.options)._requests
    (criterion,) = (one for one in request._criteria if isinstance(one, MaxTimeCriteria))
    criterion.initial_timestamp = 0.0
    request.begin(llm.model)
    assert time.time() - criterion.initial_timestamp < 50
    assert llm.chat(ASKED[0], max_time=50.0, **GREEDY) == llm.chat(ASKED[0], **GREEDY)
    ended = llm.chat(ASKED[0], max_time=1e-6, **GREEDY)
    assert len(llm.tokenizer(ended, add_special_tokens=False)["input_ids"]) == 1
