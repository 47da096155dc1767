"""Submitted requests: futures, coroutines, and the results of many prompts, with pages and without."""

import asyncio
import threading
import time
from functools import partial
from itertools import count

import pytest

import qwen_vram as qv
from qwen_vram.runtime.submissions import Result
from tests.helpers.batches import ASKED, ENDLESS, GREEDY, check_whole, load_alone, load_batched
from tests.runtime.scheduling.test_callers import Gate, at, in_thread


@pytest.fixture(scope="module")
def alone(demo):
    with load_alone(demo, weights="fp32") as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(alone):
    return [alone.chat(text, **GREEDY) for text in ASKED]


@pytest.fixture(scope="module")
def batched(demo):
    with load_batched(demo, most=2, weights="fp32", prefill_chunk_size=48) as llm:
        yield llm


@pytest.fixture(params=["batched", pytest.param("alone", marks=pytest.mark.full)])
def llm(request):
    """A model whose requests run together; in `make test-all` also one whose requests run one after the other."""
    yield from checked(request)


@pytest.fixture(params=["batched", "alone"])
def either(request):
    """Both models."""
    yield from checked(request)


def checked(request):
    found = request.getfixturevalue(request.param)
    yield found
    if request.param == "batched":
        check_whole(found)
    for _ in range(2000):
        if not found._submissions._open:
            break
        time.sleep(0.005)
    assert found._submissions._open == 0
    assert found.max_waiting == 1000


@pytest.fixture
def busy(llm):
    """A model of which each place has a request that waits for the gates to open."""
    gates = [Gate() for _ in range(llm.plan.concurrency)]
    futures = [llm.submit(ASKED[0], max_new_tokens=4, **gate.options) for gate in gates]
    opened = threading.Event()
    assert gates[0].reached.wait(60)
    yield llm, lambda: [*(gate.opened.set() for gate in gates), opened.set()]
    for gate in gates:
        gate.opened.set()
    for one in futures:
        one.result()


def chat(text):
    return [{"role": "user", "content": text}]


def test_futures_have_the_answers_of_calls(either, alone, expected):
    futures = [either.submit(text, **GREEDY) for text in ASKED]
    assert [one.result(60) for one in futures] == expected
    assert all(one.done() and not one.cancelled() and one.exception() is None for one in futures)
    several = {"seed": 3, "temperature": 4.0, "num_return_sequences": 2, "max_new_tokens": 4}
    assert either.submit(ASKED[0], **several).result() == alone.chat(ASKED[0], **several)
    called = []
    future = either.submit(prompt="The code of", **GREEDY)
    future.add_done_callback(called.append)
    assert future.result() == alone.generate("The code of", **GREEDY)
    assert called == [future] or called == []
    for _ in range(400):
        if called:
            break
        time.sleep(0.005)
    assert called == [future]


@pytest.mark.parametrize("timeout", [0, -1, True, "1", float("nan")], ids=repr)
def test_a_timeout_is_a_number_of_seconds(llm, timeout):
    with pytest.raises(qv.WorkloadError, match="timeout must be None or a number of seconds above 0, got") as caught:
        llm.submit(ASKED[0], timeout=timeout)
    assert caught.value.name == "timeout"


def test_a_request_is_checked_before_it_waits(llm):
    for given, text in (
        ({}, "pass either a message or a prompt"),
        ({"message": "a", "prompt": "b"}, "pass either a message or a prompt"),
        ({"prompt": ""}, "prompt must be a text"),
        ({"message": 5}, "message"),
        ({"message": "hi", "max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(qv.QwenVramError, match=text):
            llm.submit(**given)


def test_a_full_queue_refuses_with_its_numbers(busy, expected):
    llm, open_all = busy
    llm.max_waiting = llm.plan.concurrency + 1
    try:
        waiting = llm.submit(ASKED[1], **GREEDY)
        with pytest.raises(qv.QueueFullError) as caught:
            llm.submit(ASKED[2], **GREEDY)
        most = llm.plan.concurrency + 1
        assert (caught.value.waiting, caught.value.most) == (most, most)
        assert str(caught.value) == (
            f"{most} submitted requests are not complete, and {most} are the most; wait for results, or raise "
            "LoadedModel.max_waiting"
        )
        with pytest.raises(qv.QueueFullError):
            next(llm.generate_many([ASKED[2]], **GREEDY))
        open_all()
        assert waiting.result() == expected[1]
        deadline = time.monotonic() + 30
        while llm._submissions._open and time.monotonic() < deadline:
            time.sleep(0.005)
        assert llm.submit(ASKED[2], **GREEDY).result() == expected[2]
    finally:
        llm.max_waiting = 1000


@pytest.mark.parametrize("most", [0, -3, True, 2.0, None], ids=repr)
def test_the_length_of_the_queue_is_a_positive_number(batched, most):
    with pytest.raises(
        qv.WorkloadError, match="max_waiting must be a positive whole number of requests, got"
    ) as caught:
        batched.max_waiting = most
    assert (caught.value.name, batched.max_waiting) == ("max_waiting", 1000)


def test_a_deadline_ends_a_request(either):
    def wait(ids, scores):
        time.sleep(0.05)
        return scores

    with pytest.raises(qv.GenerationStoppedError, match=r"was stopped by its deadline after \d+ new tokens"):
        either.submit(ASKED[0], timeout=0.2, logits_processor=[wait], **ENDLESS).result()


def test_a_cancelled_request_ends_at_its_next_token(either, expected):
    seen = at(3, None)
    seen[0].call = lambda: future.cancel()
    started = threading.Event()
    seen.insert(0, lambda ids, scores: started.wait(30) and scores)
    future = either.submit(ASKED[0], logits_processor=seen, **ENDLESS)
    started.set()
    with pytest.raises(BaseException) as caught:
        future.result()
    assert type(caught.value).__name__ == "CancelledError"
    assert either.submit(ASKED[1], **GREEDY).result() == expected[1]
    assert seen[1].steps == 3


def test_coroutines_run_together_and_a_cancelled_task_ends_its_request(llm, expected):
    seen = at(10**6, None)

    async def session():
        tasks = [asyncio.create_task(llm.agenerate(text, **GREEDY)) for text in ASKED]
        endless = asyncio.create_task(llm.agenerate(ASKED[0], logits_processor=seen, **ENDLESS))
        while not seen[0].steps:
            await asyncio.sleep(0.002)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        late = await llm.agenerate(prompt="The code of", **GREEDY)
        with pytest.raises(qv.WorkloadError, match="pass either a message or a prompt"):
            await llm.agenerate()
        return await asyncio.gather(*tasks), late

    answers, late = asyncio.run(session())
    assert answers == expected
    assert late
    assert seen[0].steps < 24


def test_results_of_many_prompts_come_as_they_finish(llm, expected):
    prompts = [chat(text) for text in ASKED] * 2
    results = list(llm.generate_many(iter(prompts), **GREEDY))
    assert sorted(one.index for one in results) == list(range(10))
    assert {one.index: one.text for one in results} == {number: expected[number % 5] for number in range(10)}
    assert all(one.error is None for one in results)
    assert list(llm.generate_many([])) == []
    raw = list(llm.generate_many(["The code of"], **GREEDY))
    assert raw == [Result(0, llm.generate("The code of", **GREEDY), None)]


def test_an_error_of_one_prompt_spoils_no_other(either, expected):
    prompts = [chat(ASKED[0]), "", chat(ASKED[1]), 5, chat("hi " * 5_000), chat(ASKED[2])]
    results = {one.index: one for one in either.generate_many(prompts, **GREEDY)}
    assert [results[number].text for number in (0, 2, 5)] == expected[:3]
    for number in (1, 3, 4):
        assert results[number].text is None
        assert isinstance(results[number].error, qv.QwenVramError)
    assert "max_position_embeddings" in str(results[4].error)


def test_one_text_is_not_many_prompts(llm):
    with pytest.raises(qv.WorkloadError, match=r"prompts must be an iterable of texts or conversations, got one text"):
        llm.generate_many("What is 96 * 9?")


def test_prompts_are_read_as_places_become_free(llm):
    read = []
    most = 4 * llm.plan.concurrency

    def prompts():
        for number in range(3 * most):
            read.append(number)
            yield chat(ASKED[number % 5])

    given = 0
    for _ in llm.generate_many(prompts(), do_sample=False, max_new_tokens=2):
        given += 1
        assert len(read) <= given + most
    assert given == len(read) == 3 * most


def test_more_prompts_than_the_queue_has_places_for(llm, expected):
    llm.max_waiting = 2
    try:
        texts = [chat(ASKED[number % 5]) for number in range(9)]
        results = {one.index: one.text for one in llm.generate_many(texts, **GREEDY)}
    finally:
        llm.max_waiting = 1000
    assert results == {number: expected[number % 5] for number in range(9)}


def test_places_that_others_hold_do_not_lose_a_prompt(batched, expected):
    """A request of another caller holds a place, so that each prompt finds the queue full once."""
    seen = []
    batched.max_waiting = 2

    def look(ids, scores):
        seen.append(batched._submissions._open)
        return scores

    try:
        slow = batched.submit(ASKED[0], logits_processor=[lambda ids, scores: time.sleep(0.05) or scores], **ENDLESS)
        results = {}
        for one in batched.generate_many(map(chat, ASKED), logits_processor=[look], **GREEDY):
            results[one.index] = one.text
        assert results == dict(enumerate(expected))
        assert max(seen) == 2
        assert slow.result()
    finally:
        batched.max_waiting = 1000
    check_whole(batched)


def test_leaving_the_loop_cancels_the_others(llm, expected):
    seen = [at(10**6, None) for _ in range(3)]
    for result in llm.generate_many((chat(text) for text in ASKED), do_sample=False, max_new_tokens=24):
        assert result.error is None
        break
    endless = llm.generate_many((chat(ASKED[0]) for _ in count()), logits_processor=seen[0], **ENDLESS)
    next(endless)
    endless.close()
    for _ in range(4000):
        if not llm._submissions._open:
            break
        time.sleep(0.005)
    assert llm._submissions._open == 0
    assert llm.chat(ASKED[1], **GREEDY) == expected[1]


def test_an_error_of_the_iterable_reaches_the_caller_and_cancels_the_others(llm, expected):
    def prompts():
        yield chat(ASKED[0])
        yield chat(ASKED[1])
        raise KeyError("from the iterable")

    with pytest.raises(KeyError, match="from the iterable"):
        list(llm.generate_many(prompts(), **ENDLESS))
    assert llm.submit(ASKED[1], **GREEDY).result() == expected[1]


@pytest.mark.full
def test_eight_threads_submit(llm, expected):
    def two(number):
        return [llm.submit(ASKED[(number + more) % 5], **GREEDY).result() for more in range(2)]

    threads = [in_thread(partial(two, number)) for number in range(8)]
    for thread in threads:
        thread.join()
    assert [thread.results for thread in threads] == [
        [[expected[(number + more) % 5] for more in range(2)]] for number in range(8)
    ]


def test_a_callback_of_a_future_that_submits_again_is_refused_and_hangs_nothing(batched, expected):
    found = []

    def again(future):
        try:
            found.append(batched.submit(ASKED[1], **GREEDY))
        except qv.QwenVramError as error:
            found.append(str(error))

    gate = Gate()
    first = batched.submit(ASKED[0], max_new_tokens=3, **gate.options)
    first.add_done_callback(again)
    gate.opened.set()
    first.result()
    for _ in range(400):
        if found:
            break
        time.sleep(0.005)
    check_whole(batched)
    assert found[0].startswith("another generation cannot start inside a generation of the same model")
    assert batched.submit(ASKED[1], **GREEDY).result() == expected[1]
