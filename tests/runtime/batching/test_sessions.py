"""Sessions of a batch: requests come, wait, run, end early and fail, and no other request notices."""

import gc
import signal
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import qwen_vram as qv
from tests.helpers.batches import ASKED, ENDLESS, GREEDY, check_whole, load_alone, load_batched
from tests.runtime.scheduling.test_callers import Gate, at, in_thread, question, raises

LONG = "Alpha beta gamma delta. " * 11


@pytest.fixture(scope="module")
def expected(demo):
    """The answers to `ASKED` of a model that runs one call after the other."""
    with load_alone(demo, weights="fp32") as llm:
        return {text: llm.chat(text, **GREEDY) for text in ASKED}


@pytest.fixture(scope="module")
def llm(demo):
    with load_batched(demo, weights="fp32", prefill_chunk_size=32) as llm:
        yield llm


@pytest.fixture
def held(llm):
    """A running request that blocks the batch at its second token until the gate is opened; at the end all is whole."""
    gate = Gate()
    future = llm.submit(ASKED[0], max_new_tokens=8, **gate.options)
    assert gate.reached.wait(60)
    yield gate
    gate.opened.set()
    future.result()
    check_whole(llm)


def several(llm):
    """Calls of every kind, with lengths of their own."""
    return [
        lambda: llm.chat(ASKED[0], **GREEDY),
        lambda: "".join(llm.stream(ASKED[1], **GREEDY)),
        lambda: llm.generate(question(llm, ASKED[2]), **GREEDY),
        lambda: llm.chat(ASKED[3], **{**GREEDY, "max_new_tokens": 20}),
        lambda: "".join(llm.stream(ASKED[4], **{**GREEDY, "max_new_tokens": 3})),
        lambda: llm.generate([question(llm, text) for text in (ASKED[0], "Reverse: cat")], **GREEDY),
        lambda: llm.submit(ASKED[1], seed=3, temperature=4.0, max_new_tokens=6).result(),
        lambda: [token.id for token in llm.tokens(ASKED[2], **GREEDY)],
    ]


@pytest.fixture(scope="module")
def whole(demo):
    """The answers of `several` alone."""
    with load_alone(demo, weights="fp32") as llm:
        return [call() for call in several(llm)]


def test_eight_threads_get_what_they_would_get_alone(llm, whole):
    threads = [in_thread(call) for call in several(llm)]
    for thread in threads:
        thread.join()
    assert [thread.results for thread in threads] == [[one] for one in whole]
    check_whole(llm)


class Looks(StoppingCriteria):
    """Keeps the number of running requests at each token."""

    def __init__(self, llm):
        self.batcher, self.seen = llm._generations.batcher, []

    def __call__(self, input_ids, scores, **others):
        self.seen.append(self.batcher.running)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_more_requests_than_places_with_mixed_lengths(llm, expected):
    looks = Looks(llm)
    asked = [(ASKED[number % 5], 1 + number % 7) for number in range(12)]
    futures = [
        llm.submit(text, do_sample=False, max_new_tokens=count, stopping_criteria=[looks]) for text, count in asked
    ]
    for (text, count), future in zip(asked, futures, strict=True):
        answer = future.result()
        assert answer == expected[text][: len(answer)]
        assert answer
        assert len(llm.tokenizer(answer, add_special_tokens=False)["input_ids"]) <= count
    assert max(looks.seen) == llm.plan.concurrency == 3
    check_whole(llm)


def test_requests_that_come_while_others_run(llm, held, expected):
    late = [llm.submit(text, **GREEDY) for text in ASKED[1:4]]
    thread = in_thread(lambda: llm.chat(ASKED[4], **GREEDY))
    assert llm._generations.batcher.waiting in (3, 4)
    held.opened.set()
    assert [one.result() for one in late] == [expected[text] for text in ASKED[1:4]]
    thread.join()
    assert thread.results == [expected[ASKED[4]]]


def test_a_running_and_a_waiting_request_are_cancelled(llm, held, expected):
    seen = [at(10**6, None) for _ in range(4)]
    running = [llm.submit(text, logits_processor=one, **ENDLESS) for text, one in zip(ASKED, seen[:2])]
    waiting = [llm.submit(text, logits_processor=one, **ENDLESS) for text, one in zip(ASKED, seen[2:])]
    last = llm.submit(ASKED[2], **GREEDY)
    seen[0][0].step, seen[0][0].call = 3, running[0].cancel
    seen[1][0].step, seen[1][0].call = 4, running[1].cancel
    assert all(one.cancel() for one in waiting)
    held.opened.set()
    assert last.result() == expected[ASKED[2]]
    assert all(one.cancelled() for one in (*running, *waiting))
    assert [one[0].steps for one in seen] == [3, 4, 0, 0]
    assert not last.cancel()
    with pytest.raises(CancelledError):
        running[0].result()


def test_a_request_is_cancelled_between_two_chunks_of_its_prompt(llm, expected):
    fed = []

    def count(module, args, kwargs):
        fed.append(kwargs["input_ids"].shape[1])
        if len(fed) == 2:
            future.cancel()

    gate = Gate()
    first = llm.submit(ASKED[0], max_new_tokens=3, **gate.options)
    gate.reached.wait(60)
    future = llm.submit(prompt=LONG, **GREEDY)
    last = llm.submit(ASKED[2], **GREEDY)
    hook = llm.model.register_forward_pre_hook(count, with_kwargs=True)
    gate.opened.set()
    assert last.result() == expected[ASKED[2]]
    hook.remove()
    first.result()
    assert future.cancelled()
    assert fed[:2] == [32, 32]
    assert len(fed) == 3  # the third is the last request's
    check_whole(llm)


def test_a_stream_that_is_closed_or_dropped_frees_its_pages(llm, expected):
    free = llm._generations.batcher.pool.free_pages
    stream = llm.stream(ASKED[0], **ENDLESS)
    next(stream)
    assert llm._generations.batcher.pool.free_pages < free
    stream.close()
    assert list(stream) == []
    check_whole(llm)
    stream = llm.stream(ASKED[0], **ENDLESS)
    next(stream)
    del stream
    gc.collect()
    check_whole(llm)
    seen = at(10**6, None)
    for _ in llm.stream(ASKED[0], logits_processor=seen, **ENDLESS):
        break
    check_whole(llm)
    assert seen[0].steps < 24
    gate = Gate()
    first = llm.submit(ASKED[0], max_new_tokens=3, **gate.options)
    gate.reached.wait(60)
    waiting = llm.stream(ASKED[1], **GREEDY)
    reader = in_thread(lambda: list(waiting))
    while not llm._generations.batcher.waiting:
        time.sleep(0.002)
    closer = in_thread(waiting.close)
    gate.opened.set()
    closer.join()
    reader.join()
    assert reader.results[0] in ([], [expected[ASKED[1]]])
    first.result()
    check_whole(llm)


def test_a_deadline_ends_a_running_and_a_waiting_request(llm, expected):
    slow = at(10**6, None)
    slow.append(lambda ids, scores: time.sleep(0.05) or scores)
    running = llm.submit(ASKED[0], timeout=0.3, logits_processor=slow, **ENDLESS)
    beside = llm.submit(ASKED[1], **GREEDY)
    assert beside.result() == expected[ASKED[1]]
    with pytest.raises(
        qv.GenerationStoppedError, match=r"the generation was stopped by its deadline after \d+ new"
    ) as e:
        running.result()
    assert 0 <= e.value.tokens < 24
    gate = Gate()
    first = llm.submit(ASKED[0], max_new_tokens=3, **gate.options)
    gate.reached.wait(60)
    waiting = llm.submit(ASKED[1], timeout=0.01, **GREEDY)
    in_time = llm.submit(ASKED[2], timeout=60, **GREEDY)
    time.sleep(0.05)
    gate.opened.set()
    with pytest.raises(qv.GenerationStoppedError, match="was stopped by its deadline after 0 new tokens"):
        waiting.result()
    assert in_time.result() == expected[ASKED[2]]
    first.result()
    check_whole(llm)


def test_stop_ends_all_requests_and_later_ones_run(llm, expected):
    gate = Gate()
    running = [llm.submit(ASKED[0], max_new_tokens=20, **gate.options)]
    gate.reached.wait(60)
    waiting = [llm.submit(text, **GREEDY) for text in ASKED[1:]]
    llm.stop()
    gate.opened.set()
    for one, tokens in [(running[0], "[12]"), *((one, "0") for one in waiting)]:
        with pytest.raises(qv.GenerationStoppedError, match=rf"was stopped by stop\(\) after {tokens} new tokens"):
            one.result()
    check_whole(llm)
    assert llm.chat(ASKED[1], **GREEDY) == expected[ASKED[1]]


class Fails(BaseStreamer):
    """Raises an error where it is told to."""

    def __init__(self, where):
        self.where, self.count = where, 0

    def put(self, value):
        self.count += 1
        if self.where == self.count:
            raise ValueError("mine")

    def end(self):
        if self.where == "end":
            raise ValueError("mine")


def ends_in_error(input_ids, scores, **others):
    if input_ids.shape[1] > 20:
        raise ValueError("mine")
    return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": "at 1"},
        {"logits_processor": "at 3"},
        {"stopping_criteria": [ends_in_error]},
        {"streamer": 1},
        {"streamer": 3},
        {"streamer": "end"},
        {"logits_processor": "at 2", "num_return_sequences": 3, "do_sample": True, "seed": 1},
    ],
    ids=lambda options: ", ".join(options),
)
def test_an_error_of_one_request_spoils_no_other(llm, expected, options):
    given = {**ENDLESS, **options}
    if "logits_processor" in given:
        given["logits_processor"] = at(int(given["logits_processor"][3:]), raises(ValueError("mine")))
    if "streamer" in given:
        given["streamer"] = Fails(given["streamer"])
    futures = [llm.submit(ASKED[1], **GREEDY), llm.submit(ASKED[0], **given), llm.submit(ASKED[2], **GREEDY)]
    with pytest.raises(ValueError, match="^mine$"):
        futures[1].result()
    assert [futures[number].result() for number in (0, 2)] == [expected[text] for text in ASKED[1:3]]
    check_whole(llm)


def test_an_error_of_the_model_ends_the_running_requests_and_a_later_batch_works(llm, expected):
    left = [6]

    def fail(*_):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("from a layer")

    hook = llm.model.model.layers[2].register_forward_pre_hook(fail)
    try:
        futures = [llm.submit(prompt=LONG, **ENDLESS) for _ in range(2)]
        for one in futures:
            with pytest.raises(RuntimeError, match="^from a layer$"):
                one.result()
    finally:
        hook.remove()
    assert llm.chat(ASKED[1], **GREEDY) == expected[ASKED[1]]
    check_whole(llm)


def test_a_callback_of_a_failed_request_asks_again_and_the_other_requests_have_the_error(llm, expected):
    again, left = [], [1]

    def fail(*_):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("from a layer")

    def retry(future):
        again.append(llm.submit(ASKED[2], **GREEDY))
        for _ in range(300):  # the fault lets the first one go on here
            if first.done():
                break
            time.sleep(0.01)

    gate = Gate()
    first = llm.submit(ASKED[0], max_new_tokens=8, **gate.options)
    gate.reached.wait(60)
    hook = llm.model.model.layers[2].register_forward_pre_hook(fail)
    others = [llm.submit(text, **GREEDY) for text in ASKED[1:3]]
    others[0].add_done_callback(retry)  # the first one that ends
    gate.opened.set()
    try:
        for one in (first, *others):
            assert str(one.exception(60)) == "from a layer"
    finally:
        hook.remove()
        check_whole(llm)
    assert again[0].result(60) == expected[ASKED[2]]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda llm: llm.chat("hi"), "another generation cannot start inside a generation of the same model"),
        (lambda llm: llm.submit("hi"), "another generation cannot start inside a generation of the same model"),
        (lambda llm: next(llm.stream("hi")), "another generation cannot start inside a generation of the same model"),
        (lambda llm: next(llm.generate_many(["hi"])).error.args[0], None),
        (lambda llm: llm.close(), r"close\(\) cannot run inside a generation of the same model"),
    ],
)
def test_a_call_from_inside_the_batch_is_refused_and_does_not_hang(llm, expected, call, text):
    said = []
    beside = llm.submit(ASKED[1], **GREEDY)
    future = llm.submit(ASKED[0], logits_processor=at(2, lambda: said.append(call(llm))), **GREEDY)
    if text is None:
        assert future.result(60) == expected[ASKED[0]]
        assert "another generation cannot start inside a generation" in said[0]
    else:
        with pytest.raises(qv.QwenVramError, match=text):
            future.result(60)
    assert beside.result(60) == expected[ASKED[1]]
    check_whole(llm)


def test_ctrl_c_in_a_call_stops_its_request_alone(llm, expected):
    main = threading.main_thread().ident
    beside = llm.submit(ASKED[1], **GREEDY)
    seen = at(3, lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        llm.chat(ASKED[0], logits_processor=seen, **ENDLESS)
    assert seen[0].steps < 24
    assert beside.result() == expected[ASKED[1]]
    check_whole(llm)


def test_ctrl_c_in_the_wait_for_a_future_leaves_the_request_running(llm, expected):
    main = threading.main_thread().ident
    future = llm.submit(ASKED[0], logits_processor=at(2, lambda: signal.pthread_kill(main, signal.SIGINT)), **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        [future.result(), threading.Event().wait(5)]
    assert future.result() == expected[ASKED[0]]
    check_whole(llm)


def test_closing_the_model_ends_all_requests(demo):
    llm, gate = load_batched(demo, weights="fp32"), Gate()
    running = llm.submit(ASKED[0], max_new_tokens=20, **gate.options)
    gate.reached.wait(60)
    waiting = [llm.submit(text, **GREEDY) for text in ASKED[1:]]
    stream = llm.stream(ASKED[0], **GREEDY)
    reader = in_thread(lambda: list(stream))
    while llm._generations.batcher.waiting < 5:
        time.sleep(0.002)
    closing = [in_thread(llm.close) for _ in range(2)]
    time.sleep(0.05)
    assert all(one.is_alive() for one in closing)
    gate.opened.set()
    for thread in (*closing, reader):
        thread.join()
    assert [one.results for one in closing] == [[None], [None]]
    for one, count in [(running, "[12]"), *((one, "0") for one in waiting)]:
        with pytest.raises(
            qv.GenerationStoppedError, match=rf"stopped by close\(\) of its model after {count} new tok"
        ):
            one.result()
    assert "stopped by close() of its model after 0 new tokens" in str(reader.results[0])
    for call in (
        lambda: llm.submit("hi"),
        lambda: llm.chat("hi"),
        lambda: next(llm.stream("hi", **GREEDY)),
        lambda: next(llm.tokens("hi")),
    ):
        with pytest.raises(qv.QwenVramError, match="^this model is closed; load it again$"):
            call()
    (result,) = llm.generate_many(["hi"])
    assert str(result.error) == "this model is closed; load it again"


def test_a_plan_with_pages_has_no_other_cache(llm):
    with pytest.raises(qv.NotSupportedError, match=r"load without concurrency to use new_cache\(\)$") as caught:
        llm.new_cache(max_length=50)
    assert (caught.value.knob, caught.value.value) == ("cache", "paged")


def test_a_request_that_is_too_long_is_refused_before_the_queue(demo, llm):
    with pytest.raises(
        qv.WorkloadError, match=r"a request of \d+ \+ 1,500 tokens is longer than the planned 160 \+ 24"
    ):
        llm.submit(ASKED[0], max_new_tokens=1_500)
    with pytest.raises(qv.WorkloadError, match="past the model's max_position_embeddings 4096"):
        llm.submit("hi " * 5_000)
    chunks = llm.submit(prompt="hi " * 82, do_sample=False, max_new_tokens=2)  # 160 + 24 in other parts
    assert chunks.result()
    with load_batched(demo, most=1, weights="fp32", prompt_len=20, max_new_tokens=44) as small:
        with pytest.raises(
            qv.WorkloadError, match="for which the pages are made; load with a larger prompt_len or max_"
        ):
            small.submit(prompt="hi " * 15, max_new_tokens=2)  # a prompt without chunks is fed whole
    with pytest.raises(qv.DoesNotFitError) as caught:
        load_batched(demo, ram=2**20)
    ram = caught.value.needed_bytes + 2**20
    with load_batched(demo, ram=ram) as tight:
        assert tight.chat(ASKED[0], **GREEDY)
        with pytest.raises(qv.DoesNotFitError) as refused:
            tight.submit("hi " * 1_500)
        assert refused.value.needed_bytes > refused.value.budget_bytes == ram
        check_whole(tight)


def test_a_report_has_the_pages_and_a_probe_fills_them(llm):
    llm.chat(ASKED[0], **GREEDY)
    probed = llm.probe(prompt_len=40, max_new_tokens=4)
    assert probed.measured["weights"] == llm.plan.estimate.weights
    assert probed.measured["kv_cache"] == llm.plan.estimate.kv_cache
    check_whole(llm)
