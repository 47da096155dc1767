"""Conversations as people write them, chat templates that fail, ends of turns, and tokenizers that do not fit."""

import json
import shutil
import time
from functools import partial

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import qwen_vram as qv
from qwen_vram.cli import app
from tests.conftest import make_checkpoint
from tests.helpers.command import qwen_vram
from tests.helpers.tiers import thinned

ASK = "What is 12 + 30?"
WORK = {"prompt_len": 100, "max_new_tokens": 40, "progress": False}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
# As Qwen3's: content that is no text is left out.
LIKE_QWEN3 = (
    "{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def llm(demo):
    with qv.load(demo, **WORK) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def told(llm):
    return llm.chat(ASK, do_sample=False)


def copy(demo, out, *, template=None, **changes):
    """The bundled model with another template, and other values in its files (`file__key=value`)."""
    folder = shutil.copytree(demo, out)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    for name, value in changes.items():
        file, _, key = name.partition("__")
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    return folder


def without_template(demo, out, **changes):
    folder = copy(demo, out, **changes)
    (folder / "chat_template.jinja").unlink()
    return folder


def text(part):
    return {"type": "text", "text": part}


# content


CONTENTS = [[text(ASK)], [text("What is "), text("12 + 30?")], [text(ASK), text("")], [{"text": ASK}], (text(ASK),)]


@pytest.mark.parametrize(*thinned(1, content=CONTENTS, template=[None, LIKE_QWEN3]))
def test_parts_of_text_are_one_text(llm, told, template, content):
    options = {"do_sample": False} | ({"chat_template": template} if template else {})
    messages = [{"role": "user", "content": content}]
    assert llm.chat(messages, **options) == told
    assert "".join(llm.stream(messages, **options)) == told


PARTS = {
    "image_url": {"type": "image_url", "image_url": {"url": "x"}},
    "image": {"image": "file.png"},
    "input_audio": {"type": "input_audio", "input_audio": {}},
    "video": {"type": "video", "video": "x"},
    "str": "a text by itself",
    "int": 5,
}


@pytest.mark.parametrize("template", [None, LIKE_QWEN3], ids=["as it is", "as Qwen3's"])
@pytest.mark.parametrize("kind", PARTS)
def test_other_parts_are_refused_by_name(llm, template, kind):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [text("hi"), PARTS[kind]]}]
    with pytest.raises(qv.WorkloadError, match=f"content of message 1 has a part of type '{kind}'") as caught:
        llm.chat(messages, chat_template=template)
    assert (caught.value.name, caught.value.got) == ("message", messages[1])


@pytest.mark.parametrize("content", [5, {"type": "text", "text": "hi"}, [], 1.5, True])
def test_content_of_another_kind_is_refused(llm, content):
    for call in (llm.chat, lambda messages: list(llm.stream(messages))):
        with pytest.raises(qv.WorkloadError, match="content of message 0 must be a text or a list of parts, got"):
            call([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant"},
        {"role": None, "content": "hi"},
        {"content": "hi"},
    ],
)
def test_a_message_of_nothing_is_refused(llm, message):
    with pytest.raises(qv.WorkloadError, match="message must be a text, or a list of"):
        llm.chat([{"role": "user", "content": "hi"}, message])


@pytest.mark.parametrize("extra", [{"tool_calls": [CALL]}, {"images": ["x"]}, {"audio": {"id": "x"}}], ids=str)
def test_what_a_template_would_leave_out_is_refused(llm, extra):
    (name,) = extra
    with pytest.raises(qv.WorkloadError, match=f"message 1 has {name}, and this chat template does not read that"):
        llm.chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", **extra}])


CALLS = (
    "{%- for m in messages %}{{ m.content }}{%- for call in m.tool_calls %}"
    "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
def test_calls_of_tools_need_no_content(llm, arguments, content):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    talk = [{"role": "user", "content": ASK}, {"role": "assistant", "tool_calls": [call], **content}]
    made = llm._prompts.of_conversation(llm.model, talk, None, None, {"chat_template": CALLS})
    assert llm.tokenizer.decode(made.inputs["input_ids"][0]) == ASK + '{"a": 1}'
    assert talk[1]["tool_calls"][0]["function"]["arguments"] is arguments  # the caller's own stay as they are


@pytest.mark.parametrize("call", [5, {"function": "add"}, {"function": {"arguments": {}}}])
def test_a_call_without_a_function_is_refused(llm, call):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(qv.WorkloadError, match="tool_calls of message 1 must be a list of"):
        llm.chat(talk, chat_template=CALLS)


# templates


BROKEN = {
    "cut off": ("{%- for message in messages %}{{ '<|im_st", r"is not a Jinja template \(line 1"),
    "an unknown tag": ("hello\n{% fooo %}", r"is not a Jinja template \(line 2: .*fooo"),
    "one that raises": (
        "{{ raise_exception('roles must alternate') }}",
        "refuses this conversation: roles must alternate;",
    ),
    "an undefined name": ("{{ messages[0].content + nothing.at.all }}", "refuses this conversation: UndefinedError"),
    "a wrong type": ("{{ messages[0].content + 5 }}", "refuses this conversation: TypeError"),
    "an unsafe one": ("{{ messages.__class__.__mro__ }}", "refuses this conversation: access to attribute"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_fails_is_one_line(demo, tmp_path, name):
    template, message = BROKEN[name]
    with qv.load(copy(demo, tmp_path / "model", template=template), **WORK) as llm:
        for call in (llm.chat, lambda ask: list(llm.stream(ask))):
            with pytest.raises(qv.QwenVramError, match=message) as caught:
                call("hi")
            assert "\n" not in str(caught.value)
            assert "pass " in str(caught.value)
        own = (demo / "chat_template.jinja").read_text()
        assert llm.chat(ASK, chat_template=own, do_sample=False, max_new_tokens=2)  # what the message says to do


def test_a_template_is_chosen_by_its_name(demo, tmp_path, told):
    own = (demo / "chat_template.jinja").read_text()
    templates = [{"name": "chatml", "template": own}, {"name": "tool_use", "template": "{{ tools }}" + own}]
    folder = without_template(demo, tmp_path / "named", tokenizer_config__chat_template=templates)
    with qv.load(folder, **WORK) as llm:
        with pytest.raises(qv.CheckpointError, match="named 'chatml', 'tool_use', and none is the default") as caught:
            llm.chat("hi")
        assert "pass chat_template='chatml'" in str(caught.value)
        assert llm.chat(ASK, chat_template="chatml", do_sample=False) == told
        with pytest.raises(qv.UnknownNameError, match="unknown chat_template 'chatlm'; choose from chatml, tool_use"):
            llm.chat("hi", chat_template="chatlm")
        prompt = llm._prompts.of_conversation(llm.model, "hi", None, None, {"tools": [{"name": "x"}]})
        assert "[{'name': 'x'}]" in llm.tokenizer.decode(prompt.inputs["input_ids"][0])
    templates[0]["name"] = "default"
    folder = without_template(demo, tmp_path / "default", tokenizer_config__chat_template=templates)
    with qv.load(folder, **WORK) as llm:
        assert llm.chat(ASK, do_sample=False) == told


def test_tags_of_transformers_are_no_syntax_errors(llm):
    template = (
        "{%- for m in messages %}{%- if m.role == 'x' %}{%- continue %}{%- endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{%- endfor %}"
    )
    prompt = llm._prompts.of_conversation(llm.model, "hi", None, None, {"chat_template": template})
    assert llm.tokenizer.decode(prompt.inputs["input_ids"][0]) == "hi"


# where a turn ends


@pytest.mark.parametrize(
    "changes",
    [
        {"generation_config__eos_token_id": 0},
        {"generation_config__eos_token_id": None},
        {"generation_config__eos_token_id": [0, 2]},
        {"generation_config__eos_token_id": [0]},
        {"generation_config__eos_token_id": -1},
        {"generation_config__eos_token_id": 0, "tokenizer_config__eos_token": "<|endoftext|>"},
    ],
    ids=str,
)
def test_a_chat_ends_where_the_template_ends_a_turn(demo, told, tmp_path, changes):
    with qv.load(copy(demo, tmp_path / "model", **changes), **WORK) as llm:
        assert llm.chat(ASK, do_sample=False) == told == "12 + 30 = 42"
        assert "".join(llm.stream(ASK, do_sample=False)) == told
        longer = {"do_sample": False, "max_new_tokens": 14}
        assert len(llm.chat(ASK, **longer, eos_token_id=None)) > len(told)  # the caller's word holds
        if changes["generation_config__eos_token_id"] == 0:
            prompt = f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n"
            assert len(llm.generate(prompt, **longer)) > len(told)  # no template, no turn


def test_a_model_without_generation_config_ends_too(demo, told, tmp_path):
    folder = copy(demo, tmp_path / "model", config__eos_token_id=0)
    (folder / "generation_config.json").unlink()
    with qv.load(folder, **WORK) as llm:
        assert llm.chat(ASK, do_sample=False) == told


@pytest.mark.parametrize(
    ("tail", "end"),
    [
        ("<|im_end|>\n", 2),
        ("\n\n<|im_end|>", 2),
        ("<|endoftext|>", 0),
        ("\n### User:", None),
        ("", None),
    ],
)
def test_the_end_of_a_turn_is_a_token_after_an_answer(llm, tail, end):
    from qwen_vram.runtime.requests.template import chosen_template, end_of_turn

    template = (
        "{% for m in messages %}{{ m.content }}" + tail.replace("\n", "\\n").join(["{{ '", "' }}"]) + "{% endfor %}"
    )
    assert end_of_turn(llm.tokenizer, chosen_template(llm.tokenizer, {"chat_template": template}, "")) == end


# tokenizers


@pytest.mark.parametrize("kind", ["no tokenizer.json", "a few words", "numbers without a token"])
def test_a_tokenizer_without_its_words_is_refused_at_load(demo, tmp_path, kind):
    folder = copy(demo, tmp_path / "model")
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    if kind == "no tokenizer.json":
        file.unlink()
    else:
        words = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
        kept = words[:100] if kind == "a few words" else [*words[:400], *words[2000:2100]]
        data["model"]["vocab"] = {word: data["model"]["vocab"][word] for word in kept}
        data["model"]["merges"] = []
        file.write_text(json.dumps(data))
    with pytest.raises(
        qv.CheckpointError, match=r"knows [\d]+ tokens, and the model has 3,072; its words are"
    ) as caught:
        qv.load(folder, **WORK)
    assert "add the model's tokenizer.json" in str(caught.value)
    assert caught.value.path == str(folder)
    shutil.copy(demo / "tokenizer.json", file)  # what it says to do
    with qv.load(folder, **WORK) as llm:
        assert llm.chat(ASK, do_sample=False) == "12 + 30 = 42"


def test_a_small_tokenizer_beside_a_large_table_is_no_fault(tmp_path):
    """Tables are padded, and tests of real shapes have the bundled tokenizer."""
    for size in (3_072, 3_200, 64_000):
        folder = make_checkpoint(
            tmp_path / str(size), vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=1
        )
        with qv.load(folder, **WORK) as llm:
            assert isinstance(llm.chat("hi", max_new_tokens=2), str)


CALLING = {
    "chat": lambda llm, ask: llm.chat(ask, do_sample=False),
    "generate": lambda llm, ask: llm.generate(ask, do_sample=False),
    "batch": lambda llm, ask: llm.generate(["hi", ask], do_sample=False),
    "stream": lambda llm, ask: list(llm.stream(ask, do_sample=False)),
}


@pytest.mark.parametrize(*thinned(1, call=list(CALLING), added=[["<tool>"], ["<a>", "<b>", "<tool>"]]))
def test_a_token_past_the_table_is_named(demo, told, tmp_path, call, added):
    folder = copy(demo, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    with qv.load(folder, **WORK) as llm:
        with pytest.raises(
            qv.CheckpointError, match="token table has 3,072 rows, and the tokenizer in .* gives '<tool>'"
        ):
            CALLING[call](llm, "<tool> hi")
        assert llm.chat(ASK, do_sample=False) == told  # without that token all is well


def test_a_table_that_was_resized_takes_the_token(demo, tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer, model = AutoTokenizer.from_pretrained(demo), AutoModelForCausalLM.from_pretrained(demo)
    tokenizer.add_tokens(["<tool>"])
    model.resize_token_embeddings(len(tokenizer))
    for one in (tokenizer, model):
        one.save_pretrained(tmp_path)
    with qv.load(tmp_path, **WORK) as llm:
        assert isinstance(llm.chat("<tool> hi", max_new_tokens=3), str)


# the command line


chat = partial(qwen_vram, "chat")


def test_a_full_conversation_begins_anew(tmp_path):
    folder = make_checkpoint(
        tmp_path / "model", hidden_size=64, intermediate_size=128, num_hidden_layers=1, max_position_embeddings=256
    )
    work = ["--prompt-len", 64, "--max-new-tokens", 32, "--set", "weights=bf16", "--set", "do_sample=false"]
    asked = ["word " * 50] * 5 + ["/clear", "hi", "/help", "/exit", "never asked"]
    result = chat(folder, *work, stdin="\n".join(asked))
    refused = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert 2 <= len(refused) <= 4
    assert all(line.endswith("type /clear to begin a new conversation") for line in refused)
    assert "max_position_embeddings 256" in refused[0]
    assert result.stdout.count("\n> ") == 9  # nothing is read after /exit
    assert "/clear begins a new conversation" in result.stdout
    alone = chat(folder, *work, stdin="word " * 300)
    assert "error: prompt_len" in alone.stderr
    assert "/clear" not in alone.stderr  # it would not help


UNABLE = [
    (None, "has no chat template; use generate()"),
    ("{{ raise_exception('no') }}", "refuses this conversation: no;"),
    ("{% for", "is not a Jinja template (line 1"),
]


@pytest.mark.parametrize(*thinned(1, case=UNABLE, asked=[["-m", "hi"], []]))
def test_a_model_that_cannot_chat_is_refused_before_its_weights_load(demo, tmp_path, case, asked):
    template, message = case
    folder = copy(demo, tmp_path / "model", template=template or "")
    if template is None:
        (folder / "chat_template.jinja").unlink()
    (folder / "model.safetensors").unlink()  # which a load would say first
    result = chat(folder, *asked, stdin="hi\n")
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-thinking"], "unknown option of the chat template 'enable_thinking'"),
        (["--set", "temprature=1"], "unknown option 'temprature'; choose from temperature"),
        (["--set", "weigths=nf4"], "unknown knob 'weigths'; choose from weights"),
        (["--temperature", "-1"], "temperature=-1.0 cannot be run; it must be a number, 0 (greedy) or more"),
        (["--set", "num_beams=2"], "stream() gives one answer as it is made: pass num_beams=1 (--set num_beams=1)"),
        (["--chat-template", "x"], "unknown chat_template 'x'"),
        (["--seed", "-1"], "seed=-1 cannot be run"),
    ],
)
def test_options_are_checked_before_weights_load(demo, tmp_path, options, message):
    folder = copy(demo, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    result = chat(folder, "-m", "hi", *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_adapter_may_bring_the_template(untied, adapter, tmp_path):
    base = without_template(untied, tmp_path / "base")
    own = shutil.copytree(adapter, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(untied / name, own)

    def asked(adapter, *more):
        short = ["-m", "hi", "--max-new-tokens", 3, "--set", "weights=bf16"]
        words = ["chat", base, *short, "--adapter", adapter, *more]
        return CliRunner().invoke(app, [str(word) for word in words])

    assert "has no chat template" in str(asked(adapter).exception)
    assert asked(own).exit_code == 0
    assert "unknown option of the chat template 'enable_thinking'" in str(asked(own, "--no-thinking").exception)


def test_options_work_on_the_command_line(demo, tmp_path):
    own = (demo / "chat_template.jinja").read_text()
    own += "{%- if enable_thinking is defined and not enable_thinking %}{{ '12 + 30 = ' }}{%- endif %}"
    folder = copy(demo, tmp_path / "model", template=own, generation_config__num_beams=2)
    result = chat(folder, "-m", ASK, "--no-thinking", "--set", "num_beams=1", "--set", "weights=fp32")
    assert result.stdout == "42\n"
    short = ("--max-new-tokens", 12)
    sampled = [
        chat(demo, "-m", ASK, "--temperature", 5, "--seed", 4, "--stop", "2", "--top-k", 0, *short).stdout
        for _ in (1, 2)
    ]
    assert sampled[0] == sampled[1]
    assert chat(demo, "-m", ASK, "--temperature", 0, "--stop", "+", "--stop", "=").stdout == "12 +\n"


def test_checks_cost_a_call_little(llm):
    """The checks before `generate` take some milliseconds for a conversation of 30 messages."""
    talk = [{"role": role, "content": "word " * 20} for _ in range(15) for role in ("user", "assistant")]
    llm._prompts.of_conversation(llm.model, talk, None, None, {})
    began = time.perf_counter()
    for _ in range(20):
        llm._prompts.of_conversation(llm.model, talk, None, None, {"temperature": 0.5})
    assert (time.perf_counter() - began) / 20 < 0.1
