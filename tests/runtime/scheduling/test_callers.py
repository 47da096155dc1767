"""One model with several callers: every answer is the one that its caller would get alone, one generation at a time."""

import gc
import signal
import threading
from itertools import zip_longest

import pytest
import torch
from transformers import Cache, LogitsProcessorList

import qwen_vram as qv
from qwen_vram.demo import ADAPTER
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from tests.helpers.processors import At

ROOM = {"attention": "fused", "kernels": "fused", "cache": "preallocated"}
SAVERS = {
    "plain": {},
    "static": {"cache": "static"},
    "preallocated": ROOM,
    "chunks": {**ROOM, "prefill_chunk_size": 16},
    "kv int8": {**ROOM, "kv_cache": "int8"},
    "kv int4": {**ROOM, "kv_cache": "int4"},
    "kv host": {**ROOM, "kv_device": "host"},
    "host table": {**ROOM, "embeddings": "host"},
    "nf4 tiles": {**ROOM, "weights": "nf4", "lm_head": "nf4", "dequantization": "tiled"},
    "int8 tiles": {**ROOM, "weights": "int8", "dequantization": "tiled"},
    "streamed": {"streamed_layers": 5},
    "streamed nf4": {**ROOM, "weights": "nf4", "streamed_layers": 4, "kv_device": "host", "embeddings": "host"},
    "disk": {**ROOM, "streamed_layers": 5, "disk_layers": 4},
    "computing": {"streamed_layers": 4, "host_layers": 2},
    "adapter": {"adapter": ADAPTER},
    "streamed adapter": {"adapter": ADAPTER, "streamed_layers": 5},
    "steps": {"attention": "fused", "cache": "static"},
}
STREAMED = ("streamed", "streamed nf4", "disk", "computing", "streamed adapter")
ASKED = ["What is 12 + 30?", "What is 96 * 9?", "What is 7 * 8?", "What is 61 - 14?", "What is 25 + 25?"]
GREEDY = {"do_sample": False, "max_new_tokens": 5}


def load(demo, saver="plain", **more):
    settings = {"profile": "default", "progress": False, "prompt_len": 120, "max_new_tokens": 60, **SAVERS[saver]}
    llm = qv.load(demo, **{**settings, **more})
    if saver == "steps":  # what `compiled=True` runs on a GPU, neither compiled nor captured
        decode_by_steps(llm.model)
        llm._generations.decoder = Decoder(llm.model, batch_size=1, max_length=180, backend=None)
    return llm


# The other savers share their mechanisms with these.
QUICK = ("plain", "chunks", "kv int8", "kv host", "streamed nf4", "disk", "computing", "streamed adapter", "steps")


@pytest.fixture(scope="module")
def model(request, demo):
    with load(demo, request.param) as llm:
        yield llm


def on(*savers):
    """A test of `model` with these savers in `make test`, and with all in `make test-all`."""
    rows = [pytest.param(saver, marks=[] if saver in savers else [pytest.mark.full]) for saver in SAVERS]
    return pytest.mark.parametrize("model", rows, indirect=True)


class Gate:
    """Blocks a generation at its second token until it is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()
        self.at = At(2, self._hold)
        self.options = {"logits_processor": LogitsProcessorList([self.at]), "eos_token_id": None, "do_sample": False}

    def _hold(self):
        self.reached.set()
        assert self.opened.wait(60)


def at(step, call):
    return LogitsProcessorList([At(step, call)])


def raises(error):
    def call():
        raise error

    return call


def in_thread(call, results=None):
    """A thread that runs `call`, and keeps what it returned or raised."""
    results = [] if results is None else results

    def run():
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.results = results
    thread.start()
    return thread


def in_line(llm, count):
    """Wait until so many generations run or wait."""
    turns = llm._generations.turns
    for _ in range(6000):
        if sum(not turn.done for turn in turns._line) >= count:
            return
        threading.Event().wait(0.005)
    raise AssertionError("nobody joined the line")


def caches():
    return [one for one in gc.get_objects() if isinstance(one, Cache)]


def generations():
    return [one for one in threading.enumerate() if one.name == "qwen-vram generation"]


def question(llm, text):
    chat = [{"role": "user", "content": text}]
    return llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def calls(llm):
    """Eight calls, of every kind."""
    one, two, three, four, five = ASKED
    cache = {}
    if llm.plan.profile.cache == "preallocated" or llm._generations.decoder is not None:
        cache = {"past_key_values": llm.new_cache(max_length=180)}
    return [
        lambda: llm.chat(one, **GREEDY),
        lambda: "".join(llm.stream(two, **GREEDY)),
        lambda: llm.generate(question(llm, three), **GREEDY),
        lambda: llm.chat(two, **GREEDY),
        lambda: "".join(llm.stream(four, **GREEDY)),
        lambda: llm.generate([question(llm, text) for text in (one, "Reverse: cat")], **GREEDY),
        lambda: llm.chat(five, **cache, **GREEDY),
        lambda: bool(llm.probe(prompt_len=40, max_new_tokens=3).measured),
    ]


@on(*QUICK)
def test_eight_threads_get_what_they_would_get_alone(model):
    expected = [call() for call in calls(model)]
    threads = [in_thread(call) for call in calls(model)]
    for thread in threads:
        thread.join()
    assert [thread.results for thread in threads] == [[one] for one in expected]
    assert len({str(one) for one in expected}) > 5


@on("chunks", "kv host", "streamed nf4", "streamed adapter", "steps")
def test_streams_that_are_read_by_turns_and_a_chat_inside_of_their_loop(model):
    one, two, three = ([text] for text in ASKED[:3])
    expected = [model.chat(*asked, **GREEDY) for asked in (one, two, three)]
    pieces, inside = [], []
    for pair in zip_longest(model.stream(*one, **GREEDY), model.stream(*two, **GREEDY), fillvalue=""):
        pieces.append(pair)
        if len(pieces) in (1, 3):
            inside.append(model.chat(*three, **GREEDY))
    found = ["".join(pair[side] for pair in pieces) for side in (0, 1)]
    assert [*found, inside[0], inside[1]] == [*expected, expected[2]]


@on("plain", "kv int8", "streamed nf4", "disk", "computing", "steps")
def test_an_error_in_a_generation_leaves_nothing_and_the_next_answer_is_right(model):
    expected = model.chat(ASKED[1], **GREEDY)
    for step, error in ((1, KeyboardInterrupt()), (2, SystemExit()), (4, ValueError("mine"))):
        with pytest.raises(type(error)) as caught:
            model.chat(ASKED[1], logits_processor=at(step, raises(error)), **GREEDY)
        assert caught.value is error
        assert not caches()  # though the error is still there, with its traceback
        with pytest.raises(type(error)):
            list(model.stream(ASKED[1], logits_processor=at(step, raises(error)), **GREEDY))
        assert not caches()
        assert model.chat(ASKED[1], **GREEDY) == expected


@on("chunks", "streamed nf4", "disk", "computing", "streamed adapter", "steps")
def test_an_interrupt_inside_of_a_layer_leaves_the_next_answer_right(model):
    expected = model.chat(ASKED[1], **GREEDY)
    layers = [layer for layer in model.model.modules() if type(layer).__name__.endswith("DecoderLayer")]
    for number, module in enumerate((layers[1].self_attn, layers[2].mlp, layers[4].input_layernorm)):
        calls_left = [number]

        def interrupt(*_, left=calls_left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        hook = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.chat(ASKED[0], **GREEDY)
        hook.remove()
        assert not caches()
        assert model.chat(ASKED[1], **GREEDY) == expected


@on("plain", "streamed nf4", "disk", "steps")
def test_an_interrupt_of_the_main_thread_stops_its_generation(model):
    main = threading.main_thread().ident
    expected = model.chat(ASKED[1], **GREEDY)
    seen = At(3, lambda: signal.pthread_kill(main, signal.SIGINT))
    endless = {"do_sample": False, "max_new_tokens": 50, "eos_token_id": None}
    with pytest.raises(KeyboardInterrupt):
        model.chat(ASKED[0], logits_processor=LogitsProcessorList([seen]), **endless)
    assert seen.steps < 50
    assert not caches()
    assert model.chat(ASKED[1], **GREEDY) == expected


@on("plain", "kv int8", "kv host", "computing", "steps")
def test_leaving_a_stream_stops_it(model):
    expected = model.chat(ASKED[1], **GREEDY)
    endless = {"do_sample": False, "max_new_tokens": 55, "eos_token_id": None}
    seen = At(0, None)
    for _ in model.stream(ASKED[0], logits_processor=LogitsProcessorList([seen]), **endless):
        break
    assert not caches()
    assert seen.steps < 55
    stream = model.stream(ASKED[0], **endless)
    next(stream)
    del stream
    assert not caches()
    with model.stream(ASKED[0], **endless) as stream:
        next(stream)
    assert not caches()
    assert list(stream) == []
    assert model.chat(ASKED[1], **GREEDY) == expected


@pytest.mark.parametrize(
    "saver",
    [
        pytest.param(saver, marks=[] if saver in ("streamed nf4", "disk", "computing") else [pytest.mark.full])
        for saver in STREAMED
    ],
)
def test_the_models_own_generate_beside_a_chat_gives_both_their_answers(demo, saver):
    with load(demo, saver) as llm:
        expected = llm.chat(ASKED[1], **GREEDY)
        inputs = llm.tokenizer(question(llm, ASKED[0]), return_tensors="pt")

        def direct():
            made = llm.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
            return llm.tokenizer.batch_decode(made, skip_special_tokens=True)[0]

        alone = direct()
        threads = [in_thread(lambda: [direct() for _ in range(2)]) for _ in range(2)]
        found = [llm.chat(ASKED[1], **GREEDY) for _ in range(2)]
        for thread in threads:
            thread.join()
        assert found == [expected] * 2
        assert [thread.results for thread in threads] == [[[alone] * 2]] * 2


@pytest.fixture
def llm(demo):
    with load(demo, "chunks") as llm:
        yield llm


def test_a_stream_whose_reader_stops_reading_goes_on_to_its_end(llm):
    expected = llm.chat(ASKED[1], **GREEDY)
    stream = llm.stream(ASKED[1], **GREEDY)
    first = next(stream)
    assert llm.chat(ASKED[0], **GREEDY) == llm.chat(ASKED[0], **GREEDY)
    assert first + "".join(stream) == expected
    assert list(stream) == []


def test_a_stream_that_nobody_reads_holds_nothing(llm):
    streams = [llm.stream(ASKED[0], **GREEDY) for _ in range(3)]
    assert not generations()
    assert not llm._generations.turns._line
    expected = llm.chat(ASKED[0], **GREEDY)
    streams[0].close()
    assert list(streams[0]) == []
    assert "".join(streams[1]) == expected


def test_callers_get_their_turns_in_the_order_in_which_they_asked(llm):
    gate, order, threads = Gate(), [], []
    first = in_thread(lambda: llm.chat(ASKED[0], max_new_tokens=4, **gate.options))
    gate.reached.wait(60)
    for number in range(7):
        threads.append(
            in_thread(
                lambda number=number: llm.chat(ASKED[1], logits_processor=at(1, lambda: order.append(number)), **GREEDY)
            )
        )
        in_line(llm, number + 2)
    assert order == []
    assert len(caches()) == 1
    gate.opened.set()
    for thread in (first, *threads):
        thread.join()
    assert order == list(range(7))


def test_another_model_does_not_wait(llm, demo):
    gate = Gate()
    thread = in_thread(lambda: llm.chat(ASKED[0], max_new_tokens=4, **gate.options))
    gate.reached.wait(60)
    with load(demo) as other:
        assert other.chat(ASKED[0], **GREEDY)
    assert thread.is_alive()
    gate.opened.set()
    thread.join()


@pytest.mark.parametrize("saver", ["plain", "chunks", "steps", "streamed"])
def test_a_stream_is_closed_from_another_thread_within_a_token(demo, saver):
    with load(demo, saver) as llm:
        gate = Gate()
        stream = llm.stream(ASKED[0], max_new_tokens=50, **gate.options)
        reader = in_thread(lambda: list(stream))
        gate.reached.wait(60)
        closer = in_thread(stream.close)
        threading.Event().wait(0.05)
        assert closer.is_alive()
        gate.opened.set()
        for thread in (reader, closer):
            thread.join()
        assert closer.results == [None]
        assert isinstance(reader.results[0], list)
        assert gate.at.steps <= 3
        assert not caches()
        assert list(stream) == []
        assert llm.report().estimate.workload.max_new_tokens < 50 or saver != "plain"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_generation_is_stopped_from_another_thread(llm, options):
    expected = llm.chat(ASKED[1], **GREEDY)
    for call in (llm.chat, llm.generate):
        gate = Gate()
        endless = {**gate.options, **options, "max_new_tokens": 50}
        runs = in_thread(lambda call=call, endless=endless: call(ASKED[0], **endless))
        gate.reached.wait(60)
        waits = in_thread(lambda: llm.chat(ASKED[1], **GREEDY))
        in_line(llm, 2)
        llm.stop()
        gate.opened.set()
        runs.join()
        waits.join()
        (error,) = runs.results
        assert isinstance(error, qv.GenerationStoppedError)
        assert (0 if "prompt_lookup_num_tokens" in options else 1) <= error.tokens <= 6
        assert str(error) == f"the generation was stopped by stop() after {error.tokens} new tokens"
        assert waits.results == [expected]
    llm.stop()  # nothing runs
    assert llm.chat(ASKED[1], **GREEDY) == expected


def test_a_stopped_stream_gives_its_pieces_and_then_the_error(llm):
    whole = llm.chat(ASKED[1], **GREEDY)
    stream = llm.stream(ASKED[1], logits_processor=at(4, llm.stop), **GREEDY)
    pieces = []
    with pytest.raises(qv.GenerationStoppedError, match=r"was stopped by stop\(\) after 4 new tokens"):
        pieces.extend(iter(stream.__next__, None))
    said = "".join(pieces)
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole)
    assert list(stream) == []


def test_a_prompt_is_stopped_before_its_next_chunk(llm):
    fed = []

    def count(module, args, kwargs):
        fed.append(kwargs["input_ids"].shape[1])
        if len(fed) == 2:
            llm.stop()

    hook = llm.model.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.raises(qv.GenerationStoppedError, match=r"after 0 new tokens") as caught:
        llm.generate("word " * 90, **GREEDY)
    hook.remove()
    assert len(fed) == 2 < 90 // 16
    assert caught.value.tokens == 0
    assert not caches()


@pytest.mark.parametrize(
    "saver",
    [
        *("plain", "disk", "computing", "streamed nf4", "steps", "adapter"),
        *(pytest.param(saver, marks=pytest.mark.full) for saver in ("chunks", "streamed")),
    ],
)
def test_closing_the_model_stops_what_runs_and_refuses_what_waits(demo, saver):
    llm, gate = load(demo, saver), Gate()
    runs = in_thread(lambda: llm.chat(ASKED[0], max_new_tokens=50, **gate.options))
    gate.reached.wait(60)
    stream = llm.stream(ASKED[0], **GREEDY)
    waits = [in_thread(lambda: llm.chat(ASKED[1], **GREEDY)), in_thread(lambda: list(stream))]
    in_line(llm, 3)
    closing = [in_thread(llm.close) for _ in range(2)]
    for thread in waits:
        thread.join()
    assert runs.is_alive()
    assert all(thread.is_alive() for thread in closing)
    gate.opened.set()
    for thread in (runs, *closing):
        thread.join()
    assert isinstance(runs.results[0], qv.GenerationStoppedError)
    assert "was stopped by close() of its model after" in str(runs.results[0])
    assert gate.at.steps <= 3
    assert [thread.results for thread in closing] == [[None], [None]]
    for thread in waits:
        assert str(thread.results[0]) == "this model is closed; load it again"
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        llm.chat(ASKED[0])
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        llm.stream(ASKED[0], **GREEDY).__next__()
    assert not caches()


def test_what_waits_for_itself_is_refused(llm):
    expected = llm.chat(ASKED[1], **GREEDY)
    for call, text in (
        (lambda: llm.chat("hi"), "another generation cannot start inside a generation of the same model"),
        (lambda: next(llm.stream("hi")), "another generation cannot start inside a generation of the same model"),
        (llm.close, r"close\(\) cannot run inside a generation of the same model"),
    ):
        with pytest.raises(qv.QwenVramError, match=text):
            llm.chat(ASKED[0], logits_processor=at(2, call), **GREEDY)
        assert llm.chat(ASKED[1], **GREEDY) == expected


def test_a_thread_that_ends_in_the_middle_of_its_call_holds_nothing(llm):
    import ctypes

    expected, gate = llm.chat(ASKED[1], **GREEDY), Gate()
    thread = in_thread(lambda: llm.chat(ASKED[0], max_new_tokens=50, **gate.options))
    gate.reached.wait(60)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    gate.opened.set()
    thread.join()
    assert type(thread.results[0]) is SystemExit
    assert llm.chat(ASKED[1], **GREEDY) == expected


def test_saving_takes_a_turn(demo, tmp_path):
    with load(demo, "streamed nf4") as llm:
        expected, gate = llm.chat(ASKED[1], **GREEDY), Gate()
        thread = in_thread(lambda: llm.chat(ASKED[0], max_new_tokens=4, **gate.options))
        gate.reached.wait(60)
        saves = in_thread(lambda: llm.save_quantized(tmp_path / "saved", progress=False))
        in_line(llm, 2)
        assert not (tmp_path / "saved").exists()
        gate.opened.set()
        thread.join()
        assert llm.chat(ASKED[1], **GREEDY) == expected
        saves.join()
        assert not isinstance(saves.results[0], BaseException)
    with qv.load(tmp_path / "saved", progress=False) as again:
        assert again.chat(ASKED[1], **GREEDY) == expected


def test_the_callers_own_streamer_gets_the_tokens_too(llm):
    class Mine:
        def __init__(self):
            self.got, self.ended = [], 0

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.ended += 1

    mine = Mine()
    text = "".join(llm.stream(ASKED[1], streamer=mine, **GREEDY))
    assert text == llm.chat(ASKED[1], **GREEDY)
    assert mine.ended == 1
    new = [token for tokens in mine.got[1:] for token in tokens]
    assert llm.tokenizer.decode(new, skip_special_tokens=True) == text


def test_what_an_outer_error_holds_is_not_touched(llm):
    def fail():
        mine = torch.ones(3)
        raise KeyError(mine.sum().item())

    def fail_twice():
        try:
            fail()
        except KeyError:
            llm.chat(ASKED[0], logits_processor=at(1, raises(ValueError("inner"))), **GREEDY)

    with pytest.raises(ValueError, match="inner") as caught:
        fail_twice()
    outer = caught.value.__context__
    assert type(outer) is KeyError
    assert outer.__traceback__.tb_next.tb_frame.f_locals["mine"].sum() == 3
