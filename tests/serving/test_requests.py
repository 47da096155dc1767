"""Requests as data: every field is checked by type and range, and what would change the answer is refused by name."""

import json
import re
from pathlib import Path

import pytest

from qwen_vram.serving.wire.body import MAX_DEPTH, parsed_object
from qwen_vram.serving.wire.problem import ApiError
from qwen_vram.serving.wire.requests import chat_request, completion_request
from qwen_vram.serving.wire.unsupported import REFUSED

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def refused(read, body):
    with pytest.raises(ApiError) as caught:
        read(body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is not JSON: Expecting value at line 1, column 1"),
        (b"[1]", "the body must be a JSON object, got [1]"),
        (b'{"a": \xff}', "the body is not UTF-8 (byte 6)"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": ' + b"7" * 5000 + b"}", "a number has too many digits"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"nested deeper than {MAX_DEPTH} levels"),
        (b'{"a":' * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
    ],
)
def test_a_body_that_is_no_plain_json_object_is_refused(body, words):
    error = refused(parsed_object, body)
    assert words in str(error)
    assert error.code == "invalid_json"


def test_a_body_at_the_limit_is_read():
    deep = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b', "b": "\\ud83d\\ude00"}'
    assert parsed_object(deep)["b"] == "\U0001f600"


WRONG = {
    "model": (1, ["m"]),
    "n": (0, 17, 1.0, True, "1"),
    "stream": (1, "true"),
    "stream_options": (True, {"include_usage": True}),
    "max_tokens": (0, -1, 10**10, 1.5),
    "stop": (1, [""], ["a"] * 17, ["a", 1], "x" * 1001, {}),
    "seed": (2**64, -(2**63) - 1, 0.5),
    "temperature": (-0.1, 2.1, True, "1", 10**400),
    "top_p": (1.1, -1),
    "min_p": (2,),
    "top_k": (-2, 1.5),
    "repetition_penalty": (0, 11),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_field_out_of_its_range_is_refused_by_name(name):
    for value in WRONG[name]:
        for read, body in ((chat_request, CHAT), (completion_request, TEXT)):
            error = refused(read, {**body, name: value})
            assert error.param == name, value
            assert str(error).startswith(name), value
            assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools[0].function.parameters"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_part_of_a_chat_is_refused_by_its_place(fields, param):
    assert refused(chat_request, {**CHAT, **fields}).param == param


@pytest.mark.parametrize("prompt", [None, "", [], [""], [1, 2], [["a"]], 5, ["a"] * 17])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    assert refused(completion_request, {"prompt": prompt}).param == "prompt"


def test_arguments_of_a_call_become_an_object_and_stay_text_if_they_are_none():
    def read(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return chat_request({"messages": [message]}).messages[0]["tool_calls"][0]["function"]["arguments"]

    assert read('{"a": 1}') == {"a": 1}
    assert read("not JSON") == "not JSON"
    error = refused(lambda text: read(text), "[" * 3000)
    assert "nested deeper" in str(error)


def test_fields_mean_what_they_mean_elsewhere():
    body = {**CHAT, "max_tokens": 5, "max_completion_tokens": 7, "stop": "x", "seed": -1, "top_k": -1, "top_p": 1}
    wanted = chat_request({**body, "logprobs": True, "messages": [{"role": "developer", "content": "be brief"}]})
    assert (wanted.max_tokens, wanted.stops, wanted.seed, wanted.logprobs) == (7, ("x",), 2**64 - 1, 0)
    assert wanted.sampling == {"top_k": 0, "top_p": 1.0}
    assert wanted.messages == [{"role": "system", "content": "be brief"}]
    assert completion_request(TEXT).max_tokens == 16
    assert chat_request(CHAT).max_tokens is None
    tool = [{"type": "function", "function": {"name": "f"}}]
    assert chat_request({**CHAT, "tools": tool, "tool_choice": "none"}).tools == []
    assert chat_request({**CHAT, "tools": tool}).tools == tool


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name_and_documented(name):
    harmless, why = REFUSED[name]
    for value in ("something", 0.25, {"a": 1}, ["a"]):
        for read, body in ((chat_request, CHAT), (completion_request, TEXT)):
            error = refused(read, {**body, name: value})
            assert (error.param, error.code) == (name, "unsupported_parameter")
            assert str(error).startswith(f"{name} is not supported here: {why}; got ")
    for value in (None, *harmless):
        chat_request({**CHAT, name: value})
        completion_request({**TEXT, name: value})
    assert re.search(rf"`{name}`", PAGE.read_text()), f"docs/serving.md does not name {name}"


def test_true_is_not_1():
    assert refused(chat_request, {**CHAT, "presence_penalty": False}).param == "presence_penalty"
    assert refused(chat_request, {**CHAT, "parallel_tool_calls": 1}).param == "parallel_tool_calls"


def test_an_error_is_openais_object():
    error = ApiError(429, "later", code="queue_full", facts={"bytes": 5})
    expected = {"message": "later", "type": "rate_limit_error", "param": None, "code": "queue_full", "bytes": 5}
    assert json.loads(json.dumps(error.body())) == {"error": expected}
    kinds = {status: ApiError(status, "x").body()["error"]["type"] for status in (400, 401, 404, 413, 500, 503)}
    assert kinds == {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        413: "invalid_request_error",
        500: "server_error",
        503: "server_error",
    }
