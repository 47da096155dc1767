"""Checkpoints that bitsandbytes quantized already, and adapters beside a base: counted, and loaded with no knob."""

import json
import shutil

import pytest
import torch

import qwen_vram as qv
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.measure import weight_storages

QUANTIZED = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8")


@pytest.fixture(scope="module", params=QUANTIZED)
def stored(request, untied, tmp_path_factory):
    """A checkpoint saved by plain transformers from a quantized model, before it ran."""
    folder = tmp_path_factory.mktemp(request.param)
    with qv.load(untied, profile="default", weights=request.param, progress=False) as llm:
        llm.model.save_pretrained(folder)
        llm.tokenizer.save_pretrained(folder)
    return request.param, folder


def test_it_is_counted_as_stored_with_no_knob(stored, untied):
    name, folder = stored
    for profile in ("default", "int4-flash"):
        assert qv.estimate_vram(folder, profile).weights == qv.estimate_vram(untied, profile, weights=name).weights
    assert qv.plan(folder, vram="8GiB", ram="8GiB").profile.weights == name


def test_it_loads_with_no_knob_and_gives_the_same_logits(stored, untied):
    name, folder = stored
    inputs = {"input_ids": torch.arange(3, 40)[None]}
    with qv.load(untied, profile="default", weights=name, progress=False) as llm:
        expected = llm.model(**inputs).logits
    with qv.load(folder, progress=False) as llm:
        assert sum(weight_storages(llm.model, get_backend(name)).values()) == llm.plan.estimate.weights
        assert torch.equal(llm.model(**inputs).logits, expected)


def test_another_format_is_refused(stored):
    name, folder = stored
    with pytest.raises(qv.ConfigError, match=f"the checkpoint is stored with weights='{name}', got weights='bf16'"):
        qv.load(folder, weights="bf16")


def test_a_matrix_that_is_not_in_its_format_is_refused(stored, tmp_path):
    name, folder = stored
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    quantization = config["quantization_config"]
    if name == "int8":
        quantization |= {"load_in_8bit": False, "load_in_4bit": True}
        quantization |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    else:
        quantization |= {"load_in_8bit": True, "load_in_4bit": False}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        qv.CheckpointError,
        match=f"'.*' is stored in {name}, and .* says load_in_.*; set load_in_.* to true and load_in",
    ):
        qv.load(broken)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "int8"])
def test_an_adapter_beside_its_base_is_counted_and_runs(untied, adapter, weights):
    with qv.load(untied, profile="default", weights=weights, adapter=adapter, progress=False) as llm:
        estimate = llm.plan.estimate
        assert sum(weight_storages(llm.model, get_backend(weights)).values()) == estimate.weights
        base = qv.estimate_vram(untied, weights=weights)
        elements = sum(weight.numel for weight in estimate.architecture.adapter_weights)
        assert estimate.weights - base.weights == elements * (4 if weights == "fp32" else 2)
        assert estimate.activations >= base.activations
        assert llm.generate("hello world", max_new_tokens=4, do_sample=False, eos_token_id=None)


def test_an_adapter_gives_what_peft_gives(untied, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    inputs = {"input_ids": torch.arange(3, 40)[None]}
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32), adapter)
    with qv.load(untied, profile="default", weights="fp32", adapter=adapter, progress=False) as llm:
        assert torch.equal(llm.model(**inputs).logits, expected(**inputs).logits)


def test_an_adapter_for_another_base_is_refused(tied, qwen3, adapter):
    with pytest.raises(
        qv.AdapterError, match=r"does not fit the base .* has shape .*; pass the base that it was trained on"
    ):
        qv.load(qwen3, adapter=adapter)


def test_an_adapter_that_is_none_is_refused(untied, tmp_path, adapter):
    with pytest.raises(qv.CheckpointError, match=r"no adapter_config\.json in .*; point to the folder that PEFT"):
        qv.estimate_vram(untied, adapter=tmp_path)
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(qv.AdapterError, match="peft_type is 'IA3'; only LORA"):
        qv.estimate_vram(untied, adapter=tmp_path)


def test_peft_missing(untied, adapter, monkeypatch):
    import qwen_vram.runtime.peft_adapter as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    text = r'adapter=... needs peft, which is not installed; run: pip install "qwen-vram\[lora\]"'
    with pytest.raises(qv.BackendUnavailableError, match=text):
        qv.load(untied, adapter=adapter)
