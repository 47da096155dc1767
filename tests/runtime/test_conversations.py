"""Conversations: the answers of the whole history, from the new tokens alone, within one cache of the plan."""

import gc
import signal
import threading
import weakref
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList

import qwen_vram as qv
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from tests.helpers.processors import At

ROOM = {"attention": "fused", "cache": "preallocated"}
KINDS = {
    "preallocated": ROOM,
    "preallocated bf16": {**ROOM, "weights": "bf16"},
    "dynamic": {},
    "dynamic, eager": {"attention": "eager"},
    "static": {"cache": "static"},
    "chunks": {**ROOM, "prefill_chunk_size": 16},
    "kv int8": {**ROOM, "kv_cache": "int8"},
    "kv int4": {**ROOM, "kv_cache": "int4"},
    "kv host": {**ROOM, "kv_device": "host"},
    "streamed": {**ROOM, "kernels": "fused", "streamed_layers": 4, "kv_device": "host", "embeddings": "host"},
    "steps": {**ROOM, "kernels": "fused"},
    "steps int8": {**ROOM, "kernels": "fused", "kv_cache": "int8"},
}
# The other kinds share their mechanisms with these; the other tests have a preallocated cache.
QUICK = ("dynamic", "static", "kv int8", "streamed", "steps")
GREEDY = {"do_sample": False, "max_new_tokens": 12}
ASKED = [
    "What is 12 + 30?",
    "What is 7 * 8?",
    "3 + 4 = ?",
    "What is 61 - 14?",
    "小华有三本词典。小华的东西是什么？",
    "What is 25 + 25?",
]


def full(kind):
    return pytest.param(kind, marks=pytest.mark.full)


def load(demo, kind="preallocated", **more):
    settings = {"profile": "default", "weights": "fp32", "progress": False, "prompt_len": 400, "max_new_tokens": 60}
    llm = qv.load(demo, **{**settings, **KINDS[kind], **more})
    if kind.startswith("steps"):  # as the loader does on a GPU
        decode_by_steps(llm.model)
        sizes = {"batch_size": 1, "max_length": llm.plan.workload.context_len}
        llm._generations.decoder = Decoder(llm.model, **sizes, backend=None, kv_cache=llm.plan.profile.kv_cache)
    return llm


@pytest.fixture(scope="module")
def llm(demo):
    with load(demo) as llm:
        yield llm


@contextmanager
def feeding(llm):
    """A list of the lengths of the prefill steps; a decode step has one token."""
    fed = []

    def see(module, args, kwargs):
        tokens = kwargs["input_ids"].shape[1]
        fed.extend([tokens] if tokens > 1 else [])

    hook = llm.model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield fed
    finally:
        hook.remove()


def ids(llm, messages):
    rendered = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return rendered["input_ids"]


def common(one, other):
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


@lru_cache(maxsize=512)
def expected(llm, history, options):
    """The answer of `chat` to a whole history."""
    return llm.chat([dict(one) for one in history], **{**GREEDY, **dict(options)})


def check_answers(llm, messages, **options):
    """Each answer is that of `chat` with the messages before it."""
    history = [tuple(message.items()) for message in messages]
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            assert message["content"] == expected(llm, tuple(history[:at]), tuple(options.items()))


def at(step, call):
    return {"logits_processor": LogitsProcessorList([At(step, call)])}


def fail():
    raise RuntimeError("a processor of the caller failed")


@pytest.mark.parametrize("kind", [kind if kind in QUICK else full(kind) for kind in KINDS])
def test_answers_are_those_of_the_whole_history_from_new_tokens_alone(demo, kind):
    with load(demo, kind) as llm, feeding(llm) as fed:
        chat = llm.conversation(system="Answer in few words.", **GREEDY)
        before = []
        for question in ASKED:
            fed.clear()
            answer = chat.say(question)
            assert chat.messages[-2:] == [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            prompt = ids(llm, chat.messages[:-1])
            new = len(prompt) - common(prompt, before)
            assert sum(fed) == new - (kind == "chunks" and new % 16 == 1)  # a chunk of one token is not counted
            before = [*prompt, *llm.tokenizer.encode(answer)]  # but for the last token, which no turn feeds
            if answer != llm.tokenizer.decode(before[len(prompt) :]) or len(before) - len(prompt) == 12:
                before.pop()
        assert sum(fed) < 40 < len(prompt)
        assert len(chat.messages) == 1 + 2 * len(ASKED)
        check_answers(llm, chat.messages)


def test_an_edited_or_shortened_history_feeds_what_follows_the_edit(llm):
    chat = llm.conversation(**GREEDY)
    for question in ASKED[:4]:
        chat.say(question)
    with feeding(llm) as fed:
        old = ids(llm, chat.messages)
        chat.messages[4]["content"] = "What is 50 + 5?"
        chat.messages[5]["content"] = "50 + 5 = 55"
        chat.say("What is 25 + 25?")
        prompt = ids(llm, chat.messages[:-1])
        assert fed == [len(prompt) - common(old, prompt)]
        assert 0 < fed[0] < len(prompt)
        del chat.messages[2:]
        fed.clear()
        chat.say("What is 7 * 8?")  # the second question of before
        prompt = ids(llm, chat.messages[:-1])
        assert fed == [1] or sum(fed) < 12 < len(prompt)
        chat.messages = [{"role": "user", "content": "3 + 4 = ?"}]
        chat.say()
        assert len(chat.messages) == 2
    check_answers(llm, chat.messages)


def test_the_same_question_again_feeds_one_token(llm):
    """The cache holds the whole prompt, and the logits of its last token are needed."""
    with feeding(llm) as fed:
        chat = llm.conversation(**GREEDY)
        first = chat.say(ASKED[0])
        del chat.messages[:]
        fed.clear()
        assert chat.say(ASKED[0]) == first
        assert fed == []  # no step of more than one token


def test_a_template_that_changes_earlier_answers_feeds_them_again(llm):
    """As that of Qwen3, which leaves out earlier thinking."""
    template = (
        "{% for one in messages %}<|im_start|>{{ one.role }}\n"
        "{{ one.content.split('=')[-1] if one.role == 'assistant' and not loop.last else one.content }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    chat = llm.conversation(chat_template=template, **GREEDY)
    for question in ASKED[:4]:
        chat.say(question)
    assert any("=" in one["content"] for one in chat.messages)
    check_answers(llm, chat.messages, chat_template=template)


@pytest.mark.parametrize("kind", ["kv int8", full("steps int8")])
def test_a_quantized_cache_forgets_its_newest_tokens_or_everything(demo, kind):
    with load(demo, kind) as llm, feeding(llm) as fed:
        chat, history = llm.conversation(**GREEDY), []
        for number in range(12):
            history.append({"role": "user", "content": f"What is {number} + 3?"})
            history.append({"role": "assistant", "content": f"{number} + 3 = {number + 3}"})
        chat.messages = list(history)
        chat.say(ASKED[0])
        cache = llm._generations.kept._cache
        assert cache.layers[0].quantized > 90
        fed.clear()
        chat.messages[-2:] = []
        chat.say(ASKED[1])
        assert sum(fed) < 20
        assert llm._generations.kept._cache is cache
        chat.messages[4:] = []
        fed.clear()
        chat.say(ASKED[2])
        assert sum(fed) == len(ids(llm, chat.messages[:-1]))
        assert llm._generations.kept._cache is not cache
        assert chat.messages[-1]["content"] == llm.chat(chat.messages[:-1], **GREEDY)
        assert chat.messages[:4] == history[:4]


@pytest.mark.parametrize("kind", ["steps", full("preallocated")])
def test_a_model_has_one_cache_for_conversations_and_other_generations(demo, kind):
    with load(demo, kind) as llm, feeding(llm) as fed:
        one, other = llm.conversation(**GREEDY), llm.conversation(system="Be kind.", **GREEDY)
        kept = llm._generations.kept
        for question in ASKED[:2]:
            for chat in (one, other):
                fed.clear()
                before = kept._cache and weakref.ref(kept._cache)
                chat.say(question)
                assert sum(fed) == len(ids(llm, chat.messages[:-1]))  # the other turn has taken the cache
                assert before is None or before() is None
        held = weakref.ref(kept._cache)
        alone = llm.chat(ASKED[4], **GREEDY)
        assert held() is None
        assert kept._cache is None
        fed.clear()
        other.say(ASKED[5])
        assert sum(fed) == len(ids(llm, other.messages[:-1]))
        llm.new_cache(max_length=40)
        assert kept._cache is None
        assert llm.chat(ASKED[4], **GREEDY) == alone
        for chat in (one, other):
            check_answers(llm, chat.messages)


def test_captured_steps_keep_the_buffers_of_the_plan(demo):
    with load(demo, "steps") as llm:
        chat, decoder = llm.conversation(**GREEDY), llm._generations.decoder
        for question in ASKED[:3]:
            chat.say(question)
            assert decoder._holder() is llm._generations.kept._cache.lease
            assert decoder._home.size == (1, 460)
        home = decoder._home
        llm.chat(ASKED[0], **GREEDY)
        assert decoder._holder() is None
        assert decoder._home is home
        chat.say(ASKED[0])
        assert decoder._home is home
        chat.close()
        assert decoder._holder() is None


@pytest.mark.parametrize("kind", ["preallocated", "steps", *map(full, ("kv int8", "kv host", "dynamic"))])
def test_a_turn_that_fails_changes_no_message_and_the_next_one_is_right(demo, kind):
    with load(demo, kind) as llm:
        chat = llm.conversation(**GREEDY)
        chat.say(ASKED[0])
        before = list(chat.messages)
        for call in (chat.say, lambda *args, **more: list(chat.stream(*args, **more))):
            with pytest.raises(RuntimeError, match="a processor of the caller failed"):
                call(ASKED[1], **at(3, fail))
            assert chat.messages == before
        with pytest.raises(qv.GenerationStoppedError):
            chat.say(ASKED[1], **at(3, llm.stop))
        assert chat.messages == before
        with feeding(llm) as fed:
            chat.say(ASKED[1])
        assert sum(fed) < 3  # the stopped turn has left its prompt in the cache
        check_answers(llm, chat.messages)


def test_a_turn_that_does_not_fit_changes_nothing(demo):
    with load(demo) as llm, feeding(llm) as fed:
        chat = llm.conversation(**GREEDY)
        chat.say(ASKED[0])
        cache, before = llm._generations.kept._cache, list(chat.messages)
        limit = llm.model.config.max_position_embeddings
        for call in (chat.say, lambda *args, **more: list(chat.stream(*args, **more))):
            with pytest.raises(qv.WorkloadError, match=f"tokens are past the model's max_position_embeddings {limit}"):
                call("word " * limit)
            with pytest.raises(qv.WorkloadError, match="temperature=-1 cannot be run"):
                call(ASKED[1], temperature=-1)
        assert (chat.messages, llm._generations.kept._cache) == (before, cache)
        fed.clear()
        chat.say(ASKED[1])
        assert sum(fed) < 20
    budget = {"prompt_len": 64, "max_new_tokens": 16, "ram": "30MiB"}
    with load(demo, **budget) as llm, feeding(llm) as fed:
        chat = llm.conversation(**GREEDY)
        chat.say(ASKED[0])
        before = list(chat.messages)
        with pytest.raises(qv.DoesNotFitError):
            chat.say("word " * 1_500)
        assert chat.messages == before
        fed.clear()
        chat.say(ASKED[1])
        assert sum(fed) < 20


def test_beyond_the_planned_lengths_no_cache_is_kept(demo):
    with load(demo, prompt_len=40, max_new_tokens=12) as llm, feeding(llm) as fed:
        chat = llm.conversation(**GREEDY)
        for question in ASKED[:3]:
            fed.clear()
            chat.say(question)
            context = len(ids(llm, chat.messages[:-1])) + 12
            assert (llm._generations.kept._cache is not None) == (context <= 52)
        assert sum(fed) == context - 12 > 52
        check_answers(llm, chat.messages)


def test_a_prompt_beyond_the_planned_one_within_the_planned_context_keeps_the_cache(demo):
    with load(demo, prompt_len=40, max_new_tokens=200) as llm, feeding(llm) as fed:
        chat = llm.conversation(**GREEDY)
        for question in ASKED[:4]:
            fed.clear()
            chat.say(question)
        assert len(ids(llm, chat.messages[:-1])) > 60
        assert sum(fed) < 25


def test_a_stream_gives_the_answer_and_appends_it(llm):
    chat = llm.conversation(**GREEDY)
    chat.say(ASKED[0])
    stream = chat.stream(ASKED[1])
    assert len(chat.messages) == 2
    pieces = list(stream)
    assert chat.messages[2:] == [
        {"role": "user", "content": ASKED[1]},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    unread = chat.stream(ASKED[2])
    chat.say(ASKED[3])
    next(unread)  # it starts here, after the turn before
    del unread
    assert [one["content"] for one in chat.messages[::2]] == [ASKED[0], ASKED[1], ASKED[3], ASKED[2]]
    check_answers(llm, chat.messages[:-1])


@pytest.mark.parametrize("kind", ["steps", *map(full, ("preallocated", "kv int8"))])
def test_a_stream_that_is_left_early_appends_what_was_generated(demo, kind):
    endless = {"max_new_tokens": 50, "eos_token_id": None}
    with load(demo, kind) as llm, feeding(llm) as fed:
        chat = llm.conversation(**GREEDY)
        whole = llm.chat(ASKED[0], do_sample=False, **endless)
        with chat.stream(ASKED[0], **endless, **at(8, lambda: stream.close.__self__._stop())) as stream:
            read = "".join(stream)
        text = chat.messages[-1]["content"]
        assert len(chat.messages) == 2
        assert whole.startswith(text.rstrip("\ufffd"))
        assert text.startswith(read)
        assert 0 < len(text) < len(whole)
        for piece in chat.stream(ASKED[1], **endless):
            assert piece
            break
        assert len(chat.messages) == 4
        fed.clear()
        chat.say(ASKED[2])
        assert sum(fed) < len(ids(llm, chat.messages[:-1])) - 20
        assert chat.messages[-1]["content"] == llm.chat(chat.messages[:-1], **GREEDY)


def test_stop_ends_a_stream_with_an_error_and_keeps_its_text(llm):
    chat = llm.conversation(**GREEDY)
    pieces = []
    with pytest.raises(qv.GenerationStoppedError):
        pieces.extend(chat.stream(ASKED[0], eos_token_id=None, **at(8, llm.stop)))
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}


def test_a_turn_that_is_stopped_in_its_prompt_leaves_the_chunks_in_the_cache(demo):
    with load(demo, "chunks") as llm, feeding(llm) as fed:
        chat = llm.conversation(**GREEDY)
        chat.say(ASKED[0])
        fed.clear()
        long = "word " * 60
        hook = llm.model.register_forward_pre_hook(lambda module, args: llm.stop() if len(fed) == 2 else None)
        with pytest.raises(qv.GenerationStoppedError):
            chat.say(long)
        hook.remove()
        assert fed == [16, 16, 16] or fed == [16, 16]
        assert len(chat.messages) == 2
        held = int(llm._generations.kept._cache.get_seq_length())
        fed.clear()
        chat.say(long)
        assert sum(fed) == len(ids(llm, chat.messages[:-1])) - held
        check_answers(llm, chat.messages)


def test_an_interrupt_appends_nothing_and_the_conversation_goes_on(llm):
    main = threading.main_thread().ident
    chat = llm.conversation(**GREEDY)
    chat.say(ASKED[0])
    with pytest.raises(KeyboardInterrupt):
        chat.say(
            ASKED[1], eos_token_id=None, max_new_tokens=50, **at(3, lambda: signal.pthread_kill(main, signal.SIGINT))
        )
    assert len(chat.messages) == 2
    chat.say(ASKED[1])
    check_answers(llm, chat.messages)


def test_threads_take_turns_in_one_conversation_and_in_two(llm):
    one, other = llm.conversation(**GREEDY), llm.conversation(**GREEDY)
    errors = []

    def ask(number):
        try:
            one.say(ASKED[number])
            list(other.stream(ASKED[number]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    for chat in (one, other):
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
        assert sorted(message["content"] for message in chat.messages[::2]) == sorted(ASKED[:3])
        check_answers(llm, chat.messages)


@pytest.mark.parametrize("kind", ["preallocated", "dynamic", full("kv host")])
def test_close_frees_the_cache(demo, kind):
    with load(demo, kind) as llm:
        with llm.conversation(**GREEDY) as chat:
            chat.say(ASKED[0])
            held = weakref.ref(llm._generations.kept._cache)
            assert held() is not None
        assert held() is None
        assert repr(chat) == "<Conversation of 2 messages, closed>"
        for call in (chat.say, chat.stream):
            with pytest.raises(qv.QwenVramError, match="^this conversation is closed; begin another one with conv"):
                call(ASKED[1])
        chat = llm.conversation(**GREEDY)
        chat.say(ASKED[0], **at(2, chat.close))  # the turn ends, and its cache is not kept
        assert len(chat.messages) == 2
        assert not [one for one in gc.get_objects() if isinstance(one, Cache)]
        chat = llm.conversation(**GREEDY)
        chat.say(ASKED[0])
        held = weakref.ref(llm._generations.kept._cache)
        del chat
        gc.collect()
        assert held() is None
        chat = llm.conversation(**GREEDY)
        chat.say(ASKED[0])
        held = weakref.ref(llm._generations.kept._cache)
    assert held() is None
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        chat.say(ASKED[1])


def test_options_of_the_conversation_apply_to_every_turn_that_has_none(llm):
    chat = llm.conversation(system="Be brief.", max_new_tokens=3, do_sample=False, eos_token_id=None)
    short = chat.say(ASKED[0])
    assert len(llm.tokenizer.encode(short)) == 3
    longer = chat.say(ASKED[0], max_new_tokens=6)
    assert len(llm.tokenizer.encode(longer)) > 3
    sampled = [llm.conversation(**GREEDY).say(ASKED[4], temperature=3.0, seed=5, do_sample=True) for _ in range(2)]
    assert sampled[0] == sampled[1] == llm.chat(ASKED[4], **{**GREEDY, "do_sample": True}, temperature=3.0, seed=5)


def test_messages_of_other_roles_are_appended_in_one_turn(llm):
    chat = llm.conversation(**GREEDY)
    given = [{"role": "assistant", "content": "How can I help?"}, {"role": "user", "content": ASKED[0]}]
    chat.say(given)
    assert chat.messages[:2] == given
    assert chat.messages[2]["content"] == llm.chat(given, **GREEDY)


def test_bad_input_is_refused_with_one_error(llm):
    chat = llm.conversation(**GREEDY)
    for cache in ({"past_key_values": DynamicCache()}, {"cache_implementation": "dynamic"}):
        for options in (
            cache,
            {"generation_config": GenerationConfig(**cache)} if "cache_implementation" in cache else cache,
        ):
            for call in (chat.say, chat.stream, lambda text, **more: llm.conversation(**more)):
                with pytest.raises(
                    qv.NotSupportedError, match="not supported in a conversation, which keeps the plan's"
                ):
                    call(ASKED[0], **options)
    for options in ({"continue_final_message": True}, {"chat_template_kwargs": {"continue_final_message": True}}):
        with pytest.raises(qv.NotSupportedError, match="^continue_final_message=True is not supported in a conv"):
            chat.say(ASKED[0], **options)
    for message in (5, [], [{"text": "hi"}], {"role": "user", "content": "hi"}):
        with pytest.raises(qv.WorkloadError, match="^message must be a text, or a list of"):
            chat.say(message)
    with pytest.raises(qv.WorkloadError, match="^message must be a text, or a list of .* got \\[\\]"):
        chat.say()
    with pytest.raises(qv.WorkloadError, match="num_beams=2 cannot be run; stream.. gives one answer as it is made"):
        chat.say(ASKED[0], num_beams=2)
    with pytest.raises(qv.UnknownNameError, match="max_tokens"):
        llm.conversation(max_tokens=5)
    with pytest.raises(qv.WorkloadError, match="system must be a text, got 5"):
        llm.conversation(system=5)
    chat.messages = "hi"
    with pytest.raises(qv.WorkloadError, match="^messages of a conversation must be a list, got str; assign a list"):
        chat.say(ASKED[0])
    assert "Conversation of" in repr(chat)


def test_a_turn_inside_a_generation_is_refused(llm):
    chat = llm.conversation(**GREEDY)
    said = []

    def inside():
        for call in (chat.say, lambda text: list(chat.stream(text))):
            with pytest.raises(qv.QwenVramError, match="^a turn of a conversation cannot start inside a generation"):
                call(ASKED[1])
            said.append(1)

    chat.say(ASKED[0], **at(2, inside))
    assert said == [1, 1]
    assert len(chat.messages) == 2


def test_a_report_has_no_times_of_a_turn_that_fed_less(llm):
    chat = llm.conversation(**GREEDY)
    chat.say(ASKED[0])
    assert llm._generations.timed.workload.prompt_len == len(ids(llm, chat.messages[:1]))
    chat.say(ASKED[1])
    assert llm._generations.timed is None
    assert "ms a token" not in str(llm.report())


@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [{"profile": "default"}, {"profile": "default", **ROOM}, {"vram": "8GiB"}], ids=str)
def test_a_gpu_keeps_one_cache_and_frees_it(demo, knobs):
    work = {"prompt_len": 1_000, "max_new_tokens": 100, "progress": False}
    with qv.load(demo, **work, **knobs) as llm, feeding(llm) as fed:
        llm.chat(ASKED[0], **GREEDY)
        at_rest = torch.cuda.memory_allocated()
        chat = llm.conversation(**GREEDY)
        for question in ASKED:
            fed.clear()
            chat.say(question)
        assert sum(fed) < 40
        measured = llm.report().measured
        assert measured["peak_allocated"] <= 1.01 * llm.plan.estimate.peak_allocated
        check_answers(llm, chat.messages)
        chat.say(ASKED[0])
        chat.close()
        assert torch.cuda.memory_allocated() == at_rest
        llm.chat(ASKED[0], **GREEDY)
        assert llm.report().measured["peak_allocated"] <= 1.01 * llm.plan.estimate.peak_allocated
