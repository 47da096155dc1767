"""Options of chat, generate and stream: each reaches the template or `generate`, or is refused by its name."""

import json
import shutil
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import qwen_vram as qv
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from tests.helpers.tiers import thinned

ASK = "What is 96 * 9?"
SHORT = {"max_new_tokens": 12}
WORK = {"prompt_len": 200, "max_new_tokens": 60, "progress": False}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def llm(demo):
    with qv.load(demo, **WORK) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(llm):
    return llm.chat(ASK, do_sample=False)


@pytest.fixture(scope="module")
def thinker(demo, tmp_path_factory):
    """The bundled model with a template that reads arguments, and writes them into the prompt."""
    folder = shutil.copytree(demo, tmp_path_factory.mktemp("thinker") / "model")
    template = folder / "chat_template.jinja"
    template.write_text(
        "{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}{%- endif %}"
        "{%- for message in messages %}{{ message.tool_calls | tojson if message.tool_calls }}{%- endfor %}"
        + template.read_text()
        + "{%- if enable_thinking is defined and not enable_thinking %}{{ '12 + 30 = ' }}{%- endif %}{{ persona }}"
    )
    return folder


def settings(demo, out, **changes):
    """The bundled model with other settings in its generation_config.json."""
    folder = shutil.copytree(demo, out)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


# stop_strings, temperature, sampling


@pytest.mark.parametrize("stops", ["+", ["zz", "* 9 ="], ("+",)])
def test_texts_end_an_answer(llm, whole, stops):
    end = min(whole.index(stop) + len(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in whole)
    for answer in (
        llm.chat(ASK, do_sample=False, stop_strings=stops),
        "".join(llm.stream(ASK, do_sample=False, stop_strings=stops)),
        llm.chat(ASK, generation_config=GenerationConfig(do_sample=False, stop_strings=list(stops))),
    ):
        assert answer.startswith(whole[:end])
        assert len(answer) < len(whole)
    assert isinstance(llm.generate([ASK, "hi"], do_sample=False, stop_strings=stops, **SHORT), list)


@pytest.mark.parametrize(
    *thinned(1, options=[{}, {"do_sample": True}, {"top_p": 0.5}, {"seed": 3, "top_k": 5}], zero=[0, 0.0]), ids=str
)
def test_a_temperature_of_0_is_greedy(llm, options, zero):
    told = llm.chat(ASK, do_sample=False, max_new_tokens=12)
    assert llm.chat(ASK, temperature=zero, max_new_tokens=12, **options) == told
    assert "".join(llm.stream(ASK, temperature=zero, max_new_tokens=12, **options)) == told


@pytest.mark.parametrize(
    "options", [{"temperature": 9}, {"temperature": 9.5, "top_k": 0}, {"top_k": 3000, "temperature": 8}]
)
def test_options_of_sampling_sample(llm, options):
    """The bundled model's file says do_sample=false, over which they were left out before."""
    assert len({llm.chat(ASK, seed=seed, **options, **SHORT) for seed in range(2)}) > 1
    assert len({llm.chat(ASK, seed=seed, do_sample=False, repetition_penalty=2, **SHORT) for seed in range(2)}) == 1


# seed


@pytest.mark.parametrize(
    "call",
    [
        lambda llm, seed: llm.chat(ASK, temperature=3.0, seed=seed, **SHORT),
        lambda llm, seed: "".join(llm.stream(ASK, temperature=3.0, seed=seed, **SHORT)),
        lambda llm, seed: llm.generate(["hi", ASK], temperature=3.0, seed=seed, **SHORT),
        lambda llm, seed: llm.chat(ASK, temperature=9.0, seed=seed, num_return_sequences=3, **SHORT),
        lambda llm, seed: llm.chat(ASK, temperature=40.0, top_k=0, seed=seed, num_beams=2, **SHORT),
    ],
    ids=["chat", "stream", "batch", "several", "beams"],
)
def test_a_seed_gives_the_same_answer_and_leaves_the_callers_numbers(llm, call):
    torch.manual_seed(5)
    expected = torch.rand(4)
    first = call(llm, 7)
    torch.manual_seed(5)
    assert call(llm, 7) == first
    assert torch.equal(torch.rand(4), expected)
    torch.rand(3)
    assert call(llm, 7) == first
    assert call(llm, 8) != first


def test_numbers_drawn_between_the_pieces_of_a_stream_stay_apart(llm):
    """Numbers are drawn between two tokens, and not while one is drawn: torch has one generator for all threads."""
    whole = "".join(llm.stream(ASK, temperature=3.0, seed=1, **SHORT))
    torch.manual_seed(2)
    drawn, pieces, draws = [], [], threading.Lock()

    def begin(input_ids, scores):
        draws.acquire()
        return scores

    def end(input_ids, scores, **others):
        draws.release()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    around = {"logits_processor": [begin], "stopping_criteria": [end]}
    for piece in llm.stream(ASK, temperature=3.0, seed=1, **around, **SHORT):
        pieces.append(piece)
        with draws:
            drawn.append(torch.rand(()).item())
    torch.manual_seed(2)
    assert drawn == [torch.rand(()).item() for _ in drawn]
    assert "".join(pieces) == whole


def test_a_seed_draws_as_transformers_does_after_manual_seed(llm, demo):
    prompt = llm.tokenizer(ASK, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16)
    torch.manual_seed(11)
    made = plain.generate(**prompt, max_new_tokens=12, do_sample=True, temperature=2.0)
    answer = llm.tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert llm.generate(ASK, max_new_tokens=12, do_sample=True, temperature=2.0, seed=11) == answer


def test_decode_steps_draw_from_a_seed_too(demo):
    """As the loader makes them on a GPU, here neither compiled nor captured."""
    # In float32, for steps sum in another order, and a draw between two tokens may then fall to the other one.
    with qv.load(demo, profile="default", weights="fp32", attention="fused", cache="preallocated", **WORK) as llm:
        ordinary = llm.chat(ASK, temperature=3.0, seed=3, **SHORT)
        decode_by_steps(llm.model)
        length = llm.plan.workload.context_len
        llm._generations.decoder = Decoder(llm.model, batch_size=1, max_length=length, backend=None)
        assert llm.chat(ASK, temperature=3.0, seed=3, **SHORT) == ordinary
        assert llm.chat(ASK, do_sample=False, stop_strings=["+"]).endswith("+")


@pytest.mark.parametrize("seed", [-1, 1.5, True, "7", 2**64])
def test_a_seed_is_a_whole_number(llm, seed):
    with pytest.raises(qv.WorkloadError, match=r"seed=.* cannot be run; it must be a whole number from 0") as caught:
        llm.chat(ASK, seed=seed)
    assert (caught.value.name, caught.value.got) == ("seed", seed)


# several answers


def test_several_answers_are_a_list(llm, demo, tmp_path):
    for options in ({"do_sample": True}, {"num_beams": 3}, {"temperature": 1.5}):
        for answers in (
            llm.chat(ASK, num_return_sequences=3, **options, **SHORT),
            llm.generate(ASK, num_return_sequences=3, **options, **SHORT),
        ):
            assert isinstance(answers, list)
            assert len(answers) == 3
    assert len(llm.generate([ASK, "hi"], num_return_sequences=2, do_sample=True, **SHORT)) == 4
    folder = settings(demo, tmp_path / "model", do_sample=True, num_return_sequences=2)
    with qv.load(folder, **WORK) as several:
        assert len(several.chat(ASK, **SHORT)) == 2
        assert isinstance(several.chat(ASK, num_return_sequences=1, **SHORT), str)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_a_stream_of_several_answers_is_refused_by_name(llm, demo, tmp_path, name):
    with pytest.raises(
        qv.WorkloadError, match=rf"{name}=3 cannot be run; stream\(\) gives one answer .* pass {name}=1"
    ):
        next(llm.stream(ASK, do_sample=True, **{name: 3}))
    folder = settings(demo, tmp_path / "model", do_sample=True, **{name: 3})
    with qv.load(folder, **WORK) as several:
        with pytest.raises(qv.ConfigError, match=rf"{name}=3 in generation_config.json cannot be run; stream\(\)"):
            next(several.stream(ASK))
        assert "".join(several.stream(ASK, **{name: 1}, **SHORT))  # what the message says to do


# the template's arguments


def test_arguments_of_the_template_reach_it(thinker):
    with qv.load(thinker, **WORK) as llm:
        for options in (
            {"enable_thinking": False},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"chat_template_kwargs": {"enable_thinking": False, "persona": ""}},
        ):
            assert llm.chat("What is 12 + 30?", do_sample=False, **options) == "42"
            assert "".join(llm.stream("What is 12 + 30?", do_sample=False, **options)) == "42"
        seen = prompts(llm)
        llm.chat("hi", tools=[TOOL], persona="a cook", max_new_tokens=1)
        assert json.dumps(TOOL) in seen[-1]
        assert seen[-1].endswith("a cook")
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
        llm.chat([*talk, {"role": "tool", "content": "42"}], max_new_tokens=1)
        assert '"arguments": {"a": 1}' in seen[-1]


def prompts(llm):
    """The texts of the prompts that run from now on."""
    seen, generate = [], llm.model.generate

    def watch(**options):
        seen.append(llm.tokenizer.decode(options["input_ids"][0]))
        return generate(**options)

    llm.model.generate = watch
    return seen


def test_tools_as_functions_and_documents(thinker):
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a + b

    with qv.load(thinker, **{**WORK, "prompt_len": 400}) as llm:
        seen = prompts(llm)
        llm.chat("hi", tools=[add], max_new_tokens=1)
        assert "Add two numbers" in seen[-1]
        with pytest.raises(qv.WorkloadError, match="refuses this conversation: .*Docstring"):
            llm.chat("hi", tools=[lambda a: a])
        with pytest.raises(qv.UnknownNameError, match="would leave documents out"):
            llm.chat("hi", documents=[{"title": "t", "text": "x"}])


def test_the_last_message_can_be_continued(llm):
    talk = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "12 + 30 ="}]
    assert llm.chat(talk, continue_final_message=True, do_sample=False).strip() == "42"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"enable_thinking": False}, "unknown option of the chat template 'enable_thinking'; choose from"),
        ({"tools": [TOOL]}, "this template would leave tools out: do without it"),
        ({"chat_template_kwargs": {"persona": "a cook"}}, "would leave persona out"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs must be a dict of arguments"),
        ({"foo": 1}, "unknown option 'foo'; choose from max_new_tokens, do_sample"),
        ({"max_tokens": 5}, "unknown option 'max_tokens'; choose from max_new_tokens;"),
        ({"stop": ["x"]}, "unknown option 'stop'; choose from stop_strings;"),
        ({"n": 2}, "unknown option 'n'; choose from num_return_sequences;"),
        ({"max_length": 60}, "unknown option 'max_length'; choose from max_new_tokens;"),
        ({"temprature": 0.5}, "unknown option 'temprature'; choose from temperature"),
        ({"repetition_penality": 2}, "unknown option 'repetition_penality'; choose from repetition_penalty"),
        ({"attention_mask": None}, "unknown option 'attention_mask'"),
        ({"trust_remote_code": True}, "unknown option 'trust_remote_code'"),
        ({"generation_config": {"do_sample": True}}, "generation_config must be a transformers.GenerationConfig, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_nothing_takes_is_refused_by_name(llm, options, text):
    for call in (llm.chat, lambda ask, **options: list(llm.stream(ask, **options))):
        with pytest.raises(qv.QwenVramError) as caught:
            call(ASK, **options)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"tools": [TOOL]}, {"enable_thinking": False}, {"chat_template": "x"}])
def test_a_prompt_that_goes_through_no_template_takes_none_of_its_arguments(llm, options):
    with pytest.raises(qv.UnknownNameError, match="is for a chat template, through which chat.. and stream.. go"):
        llm.generate(ASK, **options)


def test_an_argument_is_passed_once(thinker):
    with qv.load(thinker, **WORK) as llm, pytest.raises(qv.WorkloadError, match="enable_thinking is passed twice"):
        llm.chat(ASK, enable_thinking=True, chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("nothing", [{"tools": []}, {"tools": None}, {"documents": []}, {"chat_template_kwargs": {}}])
def test_no_tools_are_no_tools(llm, nothing):
    assert llm.chat("What is 12 + 30?", do_sample=False, **nothing) == "12 + 30 = 42"


# the caller's own streamers and criteria


class Stop(StoppingCriteria):
    calls = 0

    def __call__(self, ids, scores, **_):
        self.calls += 1
        return torch.full((ids.shape[0],), self.calls >= 5)


class Gather(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("wrap", [StoppingCriteriaList, list, tuple], ids=lambda kind: kind.__name__)
def test_a_callers_criteria_stop_every_kind_of_answer(llm, wrap):
    answers = set()
    for call in (llm.chat, lambda ask, **options: "".join(llm.stream(ask, **options))):
        mine = Stop()
        answers.add(call(ASK, do_sample=False, stopping_criteria=wrap([mine])))
        assert mine.calls == 5
    assert answers == {"96 * 9"}
    assert llm.chat(ASK, do_sample=False, stopping_criteria=Stop()) == "96 * 9"  # one alone


def test_a_callers_streamer_gets_the_tokens(llm, whole):
    mine = Gather()
    assert "".join(llm.stream(ASK, do_sample=False, streamer=mine)) == whole
    assert mine.ended
    assert whole in llm.tokenizer.decode(mine.tokens)
    other = Gather()
    llm.chat(ASK, do_sample=False, streamer=other)
    assert other.tokens == mine.tokens


# values out of range, in options and in the file

WRONG = [
    ({"temperature": -1}, "a number, 0 (greedy) or more"),
    ({"temperature": "hot"}, "a number, 0 (greedy) or more"),
    ({"temperature": float("nan")}, "a number, 0 (greedy) or more"),
    ({"top_p": 2}, "a number from 0 to 1"),
    ({"top_k": -1}, "a whole number, 0 (off) or more"),
    ({"top_k": 2.5}, "a whole number, 0 (off) or more"),
    ({"min_p": -0.1}, "a number from 0 to 1"),
    ({"repetition_penalty": 0}, "a number above 0"),
    ({"no_repeat_ngram_size": -2}, "a whole number, 0 (off) or more"),
    ({"num_beams": 0}, "a whole number, 1 or more"),
    ({"num_beams": "three"}, "a whole number, 1 or more"),
    ({"num_return_sequences": 1.5}, "a whole number, 1 or more"),
    ({"stop_strings": 5}, "a text or a list of texts, none empty"),
    ({"stop_strings": [""]}, "a text or a list of texts, none empty"),
    ({"eos_token_id": "2"}, "a token id or a list of token ids"),
    ({"penalty_alpha": 0.6, "do_sample": False}, "loads code from the hub for it"),
    ({"dola_layers": "high"}, "loads code from the hub for it"),
    ({"sequence_bias": 3}, "transformers' generate() refuses these options: `sequence_bias`"),
    ({"exponential_decay_length_penalty": 3}, "transformers' generate() refuses these options"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_a_value_out_of_range_is_one_line_of_ours(llm, demo, tmp_path, wrong, text):
    options = {"do_sample": True, **wrong}
    with pytest.raises(qv.WorkloadError) as caught:
        llm.chat(ASK, **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    if any(value != value for value in wrong.values()):  # no JSON
        return
    with qv.load(settings(demo, tmp_path / "model", **options), **WORK) as other:
        with pytest.raises((qv.ConfigError, qv.WorkloadError)) as caught:
            other.chat(ASK)
        assert text in str(caught.value)
        undone = dict.fromkeys(wrong) | {"do_sample": False}
        assert other.chat(ASK, **undone, max_new_tokens=2)  # an option takes its place


def test_several_answers_need_another_way_than_the_greedy_one(llm):
    with pytest.raises(qv.WorkloadError, match="greedy decoding gives one answer: .* or num_beams=3"):
        llm.chat(ASK, num_return_sequences=3, temperature=0)
    with pytest.raises(qv.WorkloadError, match="2 beams give 2 answers at most: pass num_beams=3"):
        llm.chat(ASK, num_return_sequences=3, num_beams=2)
    assert len(llm.chat(ASK, num_return_sequences=3, num_beams=3, do_sample=False)) == 3


@pytest.mark.parametrize(
    "broken",
    [
        {"early_stopping": "x"},
        {"max_new_tokens": -1},
        {"cache_implementation": "none of these"},
        {"num_return_sequences": 3},
        {"num_beams": 2, "num_return_sequences": 3},
        {"compile_config": {}},
    ],
    ids=str,
)
def test_a_file_that_transformers_cannot_load_is_refused_before_the_weights(demo, tmp_path, broken):
    folder = settings(demo, tmp_path / "model", **broken)
    (folder / "model.safetensors").chmod(0o600)
    with pytest.raises(
        qv.ConfigError, match=r"generation_config.json' cannot be used: .* Correct that setting"
    ) as caught:
        qv.load(folder, **WORK)
    assert caught.value.source.endswith("generation_config.json")


@pytest.mark.parametrize(
    "file",
    [
        {"do_sample": True, "temperature": 0},
        {"temperature": -1},
        {"top_p": 2},
        {"use_cache": False},
        {"do_sample": True, "temperature": 1, "top_k": 1},
        {"repetition_penalty": 1},
        {"pad_token_id": -1},
        {"pad_token_id": None, "eos_token_id": None},
        {"max_length": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"num_beams": None},
    ],
    ids=str,
)
def test_settings_that_do_not_matter_do_no_harm(demo, tmp_path, file):
    with qv.load(settings(demo, tmp_path / "model", **file), **WORK) as llm:
        assert llm.chat("What is 12 + 30?") == "12 + 30 = 42"


# generation_config.json is part of the plan


@pytest.mark.parametrize(
    *thinned(
        1,
        counted=[
            ({"num_beams": 3}, 3),
            ({"num_return_sequences": 2, "do_sample": True}, 2),
            ({"num_beams": 4, "num_return_sequences": 2}, 4),
        ],
        knobs=[{"cache": "preallocated", "attention": "fused"}, {"cache": "dynamic"}, {"cache": "static"}],
    ),
    ids=str,
)
def test_beams_and_answers_of_the_file_are_counted(demo, tmp_path, counted, knobs):
    file, sequences = counted
    folder = settings(demo, tmp_path / "model", **file)
    chosen = qv.plan(folder, profile="default", vram={}, prompt_len=100, max_new_tokens=16, **knobs)
    assert (chosen.workload.batch_size, chosen.sequences) == (sequences, sequences)
    assert f"{sequences} sequences for each prompt, as num_beams and num_return_sequences" in str(chosen)
    assert qv.Plan.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    with qv.load(
        folder, profile="default", prompt_len=100, max_new_tokens=16, progress=False, verify=True, **knobs
    ) as llm:
        assert llm.plan.estimate == chosen.estimate
        assert llm.plan.call == chosen.call
        assert "batch_size=1" in chosen.call
        for options in ({}, {"eos_token_id": None}):
            llm.chat(ASK, **options)
            report = llm.report()
            assert report.estimate.workload.batch_size == sequences
            assert report.estimate.kv_cache >= report.measured["kv_cache"]
            if knobs["cache"] != "dynamic":  # which ends a token short of the context
                assert report.estimate.kv_cache == report.measured["kv_cache"]
        llm.chat(ASK, num_beams=1, num_return_sequences=1)
        assert llm.report().estimate.workload.batch_size == 1


@pytest.mark.parametrize("text", ["{}", '{"num_beams": "three"}', '{"num_beams": -2}', '{"num_beams": true}'])
def test_a_file_that_says_nothing_of_use_counts_once(demo, tmp_path, text):
    folder = shutil.copytree(demo, tmp_path / "model")
    (folder / "generation_config.json").write_text(text)
    assert qv.plan(folder, vram={}, prompt_len=100).workload.batch_size == 1


def test_beams_that_do_not_fit_are_refused_by_the_plan(demo, tmp_path):
    folder = settings(demo, tmp_path / "model", num_beams=64)
    asked = {"profile": "default", "vram": {}, "ram": "500MiB", "prompt_len": 2000, "max_new_tokens": 100}
    assert qv.plan(demo, **asked).workload.batch_size == 1
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(folder, **asked)


# padding


@pytest.mark.parametrize("missing", ["pad past the table", "no pad", "neither"])
def test_a_batch_is_padded_with_any_token_that_the_model_has(llm, demo, tmp_path, missing):
    folder = settings(demo, tmp_path / "model", pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if missing == "pad past the table":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)
        settings_file = folder / "generation_config.json"
        settings_file.write_text(json.dumps({"pad_token_id": tokenizer.pad_token_id, "eos_token_id": 2}))
    else:
        file = folder / "tokenizer_config.json"
        gone = ["pad_token"] + ["eos_token"] * (missing == "neither")
        file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(gone)))
        if missing == "neither":
            (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    asked = ("What is 3 + 4?", "What is 12 + 30?")
    prompts = [f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n" for ask in asked]
    end = {"eos_token_id": 2, "do_sample": False}
    right = llm.generate(prompts, **end)
    assert right[1] == "12 + 30 = 42"
    with qv.load(folder, batch_size=2, padded=True, **WORK) as other:
        assert other.generate(prompts, **end) == right
        assert other.chat(asked[1]) == right[1]
