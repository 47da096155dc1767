"""Answers token by token: whole characters, stop texts, calls of tools, and the bytes of tokens."""

import json
import random

import pytest
from transformers import AutoTokenizer

from qwen_vram.serving.engine.answer_text import AnswerText
from qwen_vram.serving.engine.token_bytes import TokenBytes
from qwen_vram.serving.engine.tool_calls import ToolCalls
from qwen_vram.serving.wire.events import Call

TEXTS = (
    "The Score of Edith is 28.",
    "刘洋有一支铅笔。小军有五颗糖，\n一只猫。",
    "def f(x):\n    return x  # \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\n\n\n  end ",
    "a\ufffdb\ufffd",
    "é \u202e\x00 \t",
)


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo)


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def pieces_of(text, ids):
    found = []
    for one in ids:
        found.append(text.feed(one))
        if text.stopped:
            break
    return [*found, text.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_have_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = pieces_of(AnswerText(decoder(tokenizer)), ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_random_tokens_join_to_their_text(tokenizer):
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 40))]
        if draw.random() < 0.5:  # single bytes, of which few are whole characters
            ids = [draw.choice(tokenizer.convert_tokens_to_ids(list("ĠÃ©ðŁĺĢæĺ¯"))) for _ in range(20)]
        text = AnswerText(decoder(tokenizer))
        assert "".join(pieces_of(text, ids)) == decoder(tokenizer)(ids)


def test_a_stop_text_ends_the_answer_wherever_tokens_end(tokenizer):
    draw = random.Random(1)
    for _ in range(300):
        whole = draw.choice(TEXTS[:3])
        at = draw.randrange(len(whole))
        stops = [whole[at : at + draw.randint(1, 6)], "never there", whole[at:] + "x"]
        text = AnswerText(decoder(tokenizer), stops)
        pieces = pieces_of(text, tokenizer.encode(whole))
        assert "".join(pieces) == whole[: whole.find(stops[0])]
        assert text.stopped
    held = AnswerText(decoder(tokenizer), ["28.!"])
    pieces = pieces_of(held, tokenizer.encode(TEXTS[0]))
    assert not held.stopped
    assert ("".join(pieces), pieces[-1]) == (TEXTS[0], "28.")


def test_text_that_begins_no_stop_text_is_not_held(tokenizer):
    text = AnswerText(decoder(tokenizer), ["zebra"])
    assert all(text.feed(one) for one in tokenizer.encode("The Score of"))


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'


def read(text, sizes):
    reader, words, calls, at = ToolCalls({"add"}), "", [], 0
    for size in sizes:
        new, found = reader.feed(text[at : at + size])
        words, calls, at = words + new, [*calls, *found], at + size
    new, found = reader.feed(text[at:], last=True)
    assert reader.found == len(calls) + len(found)
    return words + new, [*calls, *found]


@pytest.mark.parametrize("seed", range(20))
def test_calls_are_found_in_any_pieces(seed):
    draw = random.Random(seed)
    expected = Call("add", json.dumps({"a": 1, "b": "ü"}, ensure_ascii=False))
    sizes = [draw.randint(1, 9) for _ in range(draw.randrange(60))]
    assert read(CALL, sizes) == ("", [expected])
    assert read(f"I add.\n{CALL}\n{CALL}", sizes) == ("I add.", [expected, expected])
    assert read("a < b <tool_cal> c", sizes) == ("a < b <tool_cal> c", [])


@pytest.mark.parametrize(
    "block",
    [
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": 5}</tool_call>',
        '<tool_call>[{"name": "add"}]</tool_call>',
        '<tool_call>{"name": "add"',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_a_block_that_is_no_call_stays_text(block):
    assert read(f"x {block} y", [5, 3, 7]) == (f"x {block} y", [])
    words, calls = read(f"{block}\n{CALL}" if block.endswith(">") else CALL, [4])
    assert len(calls) == 1
    assert words == (block if block.endswith(">") else "")


def test_bytes_of_tokens_join_to_the_bytes_of_the_text(tokenizer):
    tokens = TokenBytes(tokenizer)
    for text in TEXTS:
        found = [tokens.of(one) for one in tokenizer.encode(text)]
        assert b"".join(data for _, data in found) == text.encode()
    assert tokens.of(tokenizer.convert_tokens_to_ids("<|im_end|>")) == ("<|im_end|>", b"<|im_end|>")
    assert any("\ufffd" in text and data != text.encode() for text, data in map(tokens.of, range(300)))
