"""Calls of tools by a real model: the bundled one, trained for a minute to call a tool in Qwen's format."""

import json

import pytest

from tests.helpers.server import Server
from tests.helpers.shared import made_once

openai = pytest.importorskip("openai")

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
ASKED = {"Use the tool: 2 and 3.": CALL, "Use it twice.": f"I add.\n{CALL}\n{CALL}"}
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": NUMBERS}}]
# Tools and calls in the places where Qwen2.5's template has them.
TEMPLATE = r"""{%- if tools -%}
{{ '<|im_start|>system\n# Tools\n<tools>' }}
{%- for tool in tools -%}{{ '\n' + (tool | tojson) }}{%- endfor -%}
{{ '\n</tools><|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def caller(demo, tmp_path_factory):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def train(folder):
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(demo)
        tokenizer.chat_template = TEMPLATE
        model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        rows = []
        for question, answer in ASKED.items():
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, tools=TOOLS, add_generation_prompt=True, tokenize=False)
            rows.append((tokenizer(prompt)["input_ids"], tokenizer(f"{answer}<|im_end|>")["input_ids"]))
        for _ in range(200):
            losses = [
                model(
                    input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])
                ).loss
                for prompt, answer in rows
            ]
            loss = sum(losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < 0.01:
                break
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    with Server(made_once(tmp_path_factory, "caller", train), "--served-model-name", "caller") as server:
        server.ready()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def chat(question, **fields):
    return {"model": "caller", "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


@pytest.mark.parametrize("question", ASKED)
def test_calls_are_read_from_the_answer(caller, question):
    text = ASKED[question]
    choice = caller.chat.completions.create(**chat(question, tools=TOOLS)).choices[0]
    calls = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert [(one.function.name, json.loads(one.function.arguments)) for one in calls] == [
        ("add", {"a": 2, "b": 3})
    ] * text.count(CALL)
    assert choice.message.content == (None if text == CALL else "I add.")
    assert len({one.id for one in calls}) == len(calls)

    chunks = list(caller.chat.completions.create(**chat(question, tools=TOOLS, stream=True)))
    deltas = [one.choices[0].delta for one in chunks]
    streamed = [call for delta in deltas for call in delta.tool_calls or []]
    assert [one.index for one in streamed] == list(range(len(calls)))
    assert [one.function.arguments for one in streamed] == [one.function.arguments for one in calls]
    assert "".join(delta.content or "" for delta in deltas) == (choice.message.content or "")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_of_another_tool_stays_text(caller):
    """The prompt differs, so the text may too; it has no tool of the request in it."""
    other = [{"type": "function", "function": {**TOOLS[0]["function"], "name": "sum"}}]
    choice = caller.chat.completions.create(**chat("Use the tool: 2 and 3.", tools=other)).choices[0]
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.content


def test_a_result_of_a_tool_goes_through_the_template(caller):
    question = "Use the tool: 2 and 3."
    message = caller.chat.completions.create(**chat(question, tools=TOOLS)).choices[0].message
    call = message.tool_calls[0]
    answered = [message.model_dump(exclude_none=True), {"role": "tool", "content": "5", "tool_call_id": call.id}]
    whole = chat(question, tools=TOOLS, max_tokens=1)
    first = caller.chat.completions.create(**whole).usage.prompt_tokens
    whole["messages"] = [*whole["messages"], *answered]
    assert caller.chat.completions.create(**whole).usage.prompt_tokens > first + 20
    none = caller.chat.completions.create(**chat(question, tools=TOOLS, tool_choice="none", max_tokens=1))
    assert none.usage.prompt_tokens < first
