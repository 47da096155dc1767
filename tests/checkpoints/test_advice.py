"""Refusals whose advice is followed: the page of refusals lists each, and the call works afterwards."""

import json
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.checkpoints import machine_file
from qwen_vram.spec.machine import DEFAULT

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CONFIG = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}  # fmt: skip


def estimate(knobs=None, **changes):
    return qv.estimate_vram({**CONFIG, **changes}, **(knobs or {}))


# The row of the page, the refused call with the words of its error, and the call by the error's advice.
ADVICE = {
    "the checkpoint is stored with ..., got ...": (
        lambda: estimate({"weights": "int8"}, quantization_config=NF4),
        r"the checkpoint is stored with weights='nf4', got weights='int8'; leave weights out",
        lambda: estimate(quantization_config=NF4),
    ),
    "... is a bare number": (
        lambda: qv.plan("Qwen2.5-0.5B", vram="8"),
        r"is a bare number: got '8'; write a size with its unit",
        lambda: qv.plan("Qwen2.5-0.5B", vram="8GiB"),
    ),
    "... is not a size": (
        lambda: qv.estimate_vram("Qwen2.5-0.5B").fits("8 gigs"),
        r"is not a size: got '8 gigs'; write a size with its unit",
        lambda: qv.estimate_vram("Qwen2.5-0.5B").fits("8GB"),
    ),
    "... stores matrices whose rows are a multiple of ...": (
        lambda: estimate({"weights": "int4"}, intermediate_size=90),
        r"'int4' stores matrices whose rows are a multiple of .*, got .*; use 'nf4'",
        lambda: estimate({"weights": "nf4"}, intermediate_size=90),
    ),
    "streamed_layers ... is more than the model's num_hidden_layers": (
        lambda: estimate({"streamed_layers": 3}),
        r"streamed_layers 3 is more than the model's num_hidden_layers 2; stream at most that many",
        lambda: estimate({"streamed_layers": 2}),
    ),
    "... is not a multiple of num_attention_heads": (
        lambda: estimate(hidden_size=66),
        r"hidden_size 66 is not a multiple of num_attention_heads 4; check the file against the published one",
        lambda: estimate(hidden_size=64),
    ),
    "hidden_act ... is not counted": (
        lambda: estimate(hidden_act="gelu"),
        r"hidden_act 'gelu' is not counted; every Qwen of these kinds has 'silu'",
        lambda: estimate(hidden_act="silu"),
    ),
    "this is no plan": (
        lambda: qv.Plan.from_dict({"model": "x"}),
        r"this is no plan \(.*\); pass what Plan.to_dict\(\) gave",
        lambda: qv.Plan.from_dict(json.loads(json.dumps(qv.plan("Qwen2.5-0.5B", vram="8GiB").to_dict()))),
    ),
}


@pytest.mark.parametrize("row", ADVICE)
def test_the_advice_of_a_refusal_helps(row):
    refused, words, advised = ADVICE[row]
    assert f"`{row}" in PAGE
    with pytest.raises(qv.QwenVramError, match=words):
        refused()
    assert advised()


def test_a_config_that_is_no_object_is_replaced_by_one(tmp_path):
    assert "`... holds a JSON ..., not an object`" in PAGE
    (tmp_path / "config.json").write_text(json.dumps([CONFIG]))
    with pytest.raises(qv.ConfigError, match="holds a JSON list, not an object; a model's config.json is needed"):
        qv.estimate_vram(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert qv.estimate_vram(tmp_path).weights == estimate().weights


def test_stored_machines_that_cannot_be_used_are_deleted(tmp_path, monkeypatch):
    assert "`cannot use the stored machines in ...`" in PAGE
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(tmp_path))
    (tmp_path / "machines.json").write_text("{")
    machine_file.current.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match="cannot use the stored machines in .*`qwen-vram calibrate --reset` deletes"
        ):
            assert qv.estimate_vram("Qwen2.5-0.5B").machine == DEFAULT
        assert machine_file.reset()  # what `qwen-vram calibrate --reset` calls
        assert qv.estimate_vram("Qwen2.5-0.5B").machine == DEFAULT  # without a warning, which would be an error
    finally:
        machine_file.current.cache_clear()
