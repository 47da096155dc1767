"""The tokenizer, template and end token that a trainer saved with an adapter: merged and beside the base alike."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

import qwen_vram as qv
from qwen_vram.checkpoints.adapters.tokenizer import with_end_tokens
from qwen_vram.demo import ADAPTER, CHECKPOINT
from tests.helpers.tiers import thinned

QUESTION = "Work out the area of a rectangle of 20 by 4."
ANSWER = "20 * 4 = 80"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# The bundled vocabulary's ids.
END_OF_TEXT, END_OF_TURN = 0, 2


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_base(folder: Path, *, generation: bool = True) -> Path:
    """The bundled checkpoint as a base that was never taught to chat: no template, and another end token."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit(folder / "config.json", eos_token_id=END_OF_TEXT)
    edit(folder / "generation_config.json", eos_token_id=END_OF_TEXT)
    if not generation:
        (folder / "generation_config.json").unlink()
    return folder


def make_adapter(folder: Path, *names: str) -> Path:
    """The bundled adapter with some of the tokenizer's files beside it."""
    shutil.copytree(ADAPTER, folder)
    for name in names:
        shutil.copy(CHECKPOINT / name, folder)
    return folder


def merge(base: Path, adapter: object, out: Path) -> qv.MergeReport:
    return qv.merge_lora_then_quantize(base, adapter, out, quantize=None, device="cpu", progress=False)


def answer(model: Path, adapter: Path | None = None) -> str:
    with qv.load(model, profile="default", adapter=adapter, progress=False) as llm:
        return llm.chat(QUESTION, do_sample=False, max_new_tokens=90)


@pytest.mark.parametrize(
    *thinned(1, names=[TOKENIZER, TOKENIZER[1:], TOKENIZER[2:]], generation=[True, False]),
    ids=lambda value: f"{len(value)} files" if isinstance(value, tuple) else str(value),
)
def test_a_base_model_learns_to_chat_and_to_stop(tmp_path, names, generation):
    base = make_base(tmp_path / "base", generation=generation)
    adapter = make_adapter(tmp_path / "adapter", *names)
    report = merge(base, adapter, tmp_path / "out")
    assert report.tokenizer == str(adapter)
    assert answer(tmp_path / "out") == ANSWER
    assert answer(base, adapter) == ANSWER
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if generation:
        settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        before = json.loads((base / "generation_config.json").read_text())
        assert settings == {**before, "eos_token_id": [END_OF_TURN, END_OF_TEXT]}
        assert config["eos_token_id"] == END_OF_TEXT
    else:
        assert not (tmp_path / "out" / "generation_config.json").exists()
        assert config["eos_token_id"] == [END_OF_TURN, END_OF_TEXT]


@pytest.mark.parametrize(
    "spell",
    [
        lambda config, template: {**config, "chat_template": template},
        lambda config, template: {**config, "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
        lambda config, template: {key: config[key] for key in config if key != "eos_token"},
    ],
    ids=["template in the settings", "token as an object", "token in another file"],
)
def test_spellings_of_older_trainers(tmp_path, spell: Callable[[dict[str, Any], str], dict[str, Any]]):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", *TOKENIZER)
    config, template = json.loads((adapter / TOKENIZER[1]).read_text()), (adapter / TOKENIZER[2]).read_text()
    spelled = spell(config, template)
    (adapter / TOKENIZER[1]).write_text(json.dumps(spelled))
    if "chat_template" in spelled:
        (adapter / TOKENIZER[2]).unlink()
    if "eos_token" not in spelled:
        (adapter / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    merge(base, adapter, tmp_path / "out")
    assert answer(tmp_path / "out") == ANSWER
    assert answer(base, adapter) == ANSWER
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_the_merge_in_4_bits_has_them_too(tmp_path):
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", *TOKENIZER)
    qv.merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize="nf4", device="cpu", progress=False)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert (tmp_path / "out" / TOKENIZER[2]).read_text() == (CHECKPOINT / TOKENIZER[2]).read_text()


def test_the_last_of_several_adapters_that_has_one(tmp_path):
    base, other = make_base(tmp_path / "base"), make_adapter(tmp_path / "other")
    first, second = (make_adapter(tmp_path / name, *TOKENIZER) for name in ("first", "second"))
    for adapter in (first, second):
        (adapter / TOKENIZER[2]).write_text(adapter.name)
    report = merge(base, [(first, 0.5), (second, 0.25), (other, 0.25)], tmp_path / "out")
    assert report.tokenizer == str(second)
    assert (tmp_path / "out" / TOKENIZER[2]).read_text() == "second"


def test_a_template_of_its_own_beside_the_bases(tmp_path, caplog):
    """With its vocabulary it is the trainer's tokenizer; alone it is left, and that is said."""
    template = (CHECKPOINT / TOKENIZER[2]).read_text()
    whole = make_adapter(tmp_path / "whole", *TOKENIZER)
    alone = make_adapter(tmp_path / "alone")
    for adapter in (whole, alone):
        (adapter / TOKENIZER[2]).write_text("{# mine #}" + template)
    merge(CHECKPOINT, whole, tmp_path / "one")
    assert (tmp_path / "one" / TOKENIZER[2]).read_text().startswith("{# mine #}")
    with caplog.at_level(logging.WARNING, logger="qwen_vram"):
        assert merge(CHECKPOINT, alone, tmp_path / "two").tokenizer == str(CHECKPOINT)
    assert f"the chat template in {str(alone)!r} is left out: there is no vocabulary beside it" in caplog.text
    assert (tmp_path / "two" / TOKENIZER[2]).read_text() == template


@pytest.mark.parametrize("kind", ["none", "without a template", "cut off", "too large", "unreadable"])
def test_a_tokenizer_that_is_not_taken(tmp_path, caplog, kind):
    adapter = make_adapter(tmp_path / "adapter", *(() if kind == "none" else TOKENIZER))
    if kind == "without a template":
        (adapter / TOKENIZER[2]).unlink()
    elif kind == "cut off":
        text = (adapter / TOKENIZER[0]).read_text()
        (adapter / TOKENIZER[0]).write_text(text[: len(text) // 2])
    elif kind == "too large":
        edit(adapter / TOKENIZER[1], added_tokens_decoder={"4000": {"content": "<|new|>"}})
    elif kind == "unreadable":
        edit(adapter / TOKENIZER[1], eos_token={"content": "<|im_end|>"})
    with caplog.at_level(logging.WARNING, logger="qwen_vram"):
        report = merge(CHECKPOINT, adapter, tmp_path / "out")
    assert ("is left out, and the base's taken: the tokenizer in" in caplog.text) is (kind == "unreadable")
    assert report.tokenizer == str(CHECKPOINT)
    for name in (*TOKENIZER, "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    assert answer(CHECKPOINT, adapter) == ANSWER
    rows = json.loads((CHECKPOINT / "config.json").read_text())["vocab_size"]
    assert (f"has token ids up to 4000, and the table of tokens has {rows} rows" in caplog.text) is (
        kind == "too large"
    )


@pytest.mark.parametrize(
    ("ids", "more", "expected"),
    [
        (None, (), None),
        (None, (2,), 2),
        (0, (2,), [2, 0]),
        (2, (2,), 2),
        ([2, 0], (0,), [2, 0]),
        ([0], (2, 3), [2, 3, 0]),
    ],
)
def test_end_tokens_are_added(ids, more, expected):
    assert with_end_tokens(ids, more) == expected
