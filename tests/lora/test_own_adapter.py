"""A whole model and an adapter's files in one folder: told apart by the base, told by the caller, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qwen_vram as qv
from qwen_vram.checkpoints.own_adapter import is_merged
from qwen_vram.cli import app
from tests.conftest import make_checkpoint
from tests.helpers.lora_models import edit_config, edit_tensors, logits, make_adapter, peft_merged, peft_model
from tests.helpers.lora_models import load as plain
from tests.helpers.tiers import thinned

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 4096}
FILES = ("adapter_config.json", "adapter_model.safetensors")
BOTH = r"holds a whole model and an adapter's adapter_config\.json, and no file says whether the adapter is merged into"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", **SHAPE)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("made") / "adapter", target_modules=["q_proj", "down_proj"])


@pytest.fixture
def both(base, adapter, tmp_path) -> Callable[..., Path]:
    """The adapter's files in the folder of its base, or of the merge."""

    def make(merged: bool, named: object = None) -> Path:
        folder = tmp_path / "both"
        if merged:
            qv.merge_lora_then_quantize(base, adapter, folder, quantize=None, device="cpu", progress=False)
        else:
            shutil.copytree(base, folder)
        for name in FILES:
            shutil.copy(adapter / name, folder)
        if named is not None:
            edit_config(folder, base_model_name_or_path=str(named))
        return folder

    return make


def load(model: object, adapter: object = None, **knobs: Any) -> qv.LoadedModel:
    return qv.load(
        model, adapter=adapter, **{"profile": "default", "weights": "fp32", "device": "cpu", "progress": False, **knobs}
    )


def calls(folder: Path, adapter: object = None) -> dict[str, Callable[[], object]]:
    return {
        "estimate": lambda: qv.estimate_vram(folder, adapter=adapter),
        "plan": lambda: qv.plan(folder, adapter=adapter, vram="8GiB"),
        "max_context": lambda: qv.max_context(folder, "8GiB", adapter=adapter),
        "max_batch": lambda: qv.max_batch(folder, "8GiB", adapter=adapter),
        "min_vram": lambda: qv.min_vram(folder, adapter=adapter),
        "offload_map": lambda: qv.offload_map(folder, adapter=adapter, layers_on_cpu=1),
        "load": lambda: load(folder, adapter).close(),
    }


def expect(folder: Path, adapter: object, expected: torch.Tensor, *, beside: int) -> None:
    """Every call counts the adapter's bytes once or not at all, and the loaded model answers right."""
    for call in calls(folder, adapter).values():
        call()
    alone = qv.estimate_vram(folder, weights="fp32", adapter=False).weights
    with load(folder, adapter) as llm:
        assert torch.allclose(logits(llm.model), expected, atol=0.05)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights == alone + beside
    assert qv.estimate_vram(folder, weights="fp32", adapter=adapter).weights == alone + beside
    chosen = qv.plan(folder, adapter=adapter, vram="8GiB", ram="8GiB")
    assert qv.Plan.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    called = eval(chosen.call.replace("qv.load", "qv.plan"), {"qv": qv})
    assert called.estimate.parts() == chosen.estimate.parts()


def bytes_of(adapter: Path) -> int:
    return sum(tensor.numel() * 4 for tensor in load_file(adapter / FILES[1]).values())


# told apart by the base


def test_a_base_with_its_adapter_beside_it_runs_it(base, adapter, both, caplog):
    """As plain transformers does; each tensor is the named base's, so that it is not merged."""
    folder = both(merged=False)
    assert is_merged(folder) is False
    expected = logits(peft_model(base, adapter))
    assert (logits(plain(folder)) - expected).abs().max() < 1e-6
    expect(folder, None, expected, beside=bytes_of(adapter))
    with caplog.at_level(logging.WARNING, logger="qwen_vram"), load(folder) as llm:
        assert torch.equal(logits(llm.model), expected)
    assert "held against the base it names, it is not merged, and runs beside the model" in caplog.text


def test_a_merge_with_its_adapter_beside_it_leaves_that_out(base, adapter, both, caplog):
    folder = both(merged=True)
    assert is_merged(folder) is True
    expected = logits(peft_model(base, adapter))
    assert (logits(plain(folder)) - expected).abs().max() > 0.05  # transformers puts it on a second time
    with caplog.at_level(logging.WARNING, logger="qwen_vram"):
        expect(folder, None, expected, beside=0)
    assert "held against the base it names, it is merged into the model already, and left out" in caplog.text


@pytest.mark.parametrize(
    *thinned(
        1,
        numbers=[(dtype, size) for dtype in (torch.bfloat16, torch.float32) for size in (0.02, 0.05, 0.2)],
        settings=[{"r": 2}, {"r": 16, "use_rslora": True}, {"r": 4, "lora_alpha": 1}],
    ),
    ids=str,
)
def test_the_merge_of_peft_is_told_too(base, tmp_path, numbers, settings):
    dtype, size = numbers
    made = make_adapter(base, tmp_path / "adapter", size=size, target_modules="all-linear", **settings)
    from peft import PeftModel

    merged = peft_merged(PeftModel.from_pretrained(plain(base, dtype=dtype), made))
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "both")
    for name in FILES:
        shutil.copy(made / name, tmp_path / "both")
    assert is_merged(tmp_path / "both") is True


# told by the caller, or by nobody


@pytest.mark.parametrize(*thinned(1, named=["itself", "nowhere", "no name"], merged=[False, True]))
def test_what_nobody_tells_is_refused_and_each_advice_loads(base, adapter, both, tmp_path, merged, named):
    folder = both(merged, {"itself": tmp_path / "both", "nowhere": "Qwen/Nowhere-7B", "no name": ""}[named])
    assert is_merged(folder) is None
    said = set()
    for call in calls(folder).values():
        with pytest.raises(
            qv.AdapterError,
            match=BOTH + r".*; if it is, remove .*, or pass adapter=False; if it is not, pass the folder as its own",
        ) as caught:
            call()
        said.add(str(caught.value))
    assert len(said) == 1
    advice = said.pop()
    assert f"qv.load({str(folder)!r}, adapter={str(folder)!r}), or --adapter {folder}" in advice
    assert caught.value.path == str(folder / FILES[0])
    expected = logits(peft_model(base, adapter))
    if merged:
        expect(folder, False, expected, beside=0)
        for name in FILES:
            (folder / name).unlink()
        with load(folder) as llm:
            assert torch.allclose(logits(llm.model), expected, atol=0.05)
        return
    expect(folder, folder, expected, beside=bytes_of(adapter))
    expect(folder, f"{folder}/", expected, beside=bytes_of(adapter))
    words = ["estimate", str(folder), "--adapter", str(folder), "--set", "weights=fp32", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights"] == qv.estimate_vram(folder, weights="fp32", adapter=folder).weights
    qv.merge_lora_then_quantize(folder, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)
    with load(tmp_path / "out") as llm:
        assert torch.allclose(logits(llm.model), expected, atol=0.05)


def test_another_adapter_does_not_tell_of_the_one_in_the_folder(adapter, both):
    folder = both(False, "Qwen/Nowhere-7B")
    for call in calls(folder, adapter).values():
        with pytest.raises(qv.AdapterError, match=BOTH):
            call()


def test_false_where_there_is_no_adapter(base):
    assert qv.estimate_vram(base, adapter=False) == qv.estimate_vram(base)
    with load(base, False) as llm:
        assert torch.equal(logits(llm.model), logits(plain(base)))


@pytest.mark.parametrize("weights", ["nf4", "int8-wo", "bf16"])
def test_it_is_left_out_in_every_format(base, both, weights):
    folder = both(False, "Qwen/Nowhere-7B")
    with load(folder, False, weights=weights) as llm, load(base, weights=weights) as like:
        assert torch.equal(logits(llm.model), logits(like.model))


def test_the_chat_of_the_command_line_runs_it(both, base):
    folder = both(False)
    words = ["chat", str(folder), "-m", "hi", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    edit_config(folder, base_model_name_or_path="")
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, qv.AdapterError)
    assert "holds a whole model and an adapter's" in str(refused.exception)


def test_what_the_base_does_not_settle_is_not_guessed(base, both, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = {name: tensor * 1.5 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    folder = both(True, other)
    assert is_merged(folder) is None
    edit_config(folder, base_model_name_or_path=str(base))
    assert is_merged(folder) is True
    edit_config(folder, lora_alpha=16)  # half as much was merged as it would be now
    assert is_merged(folder) is None
    edit_config(folder, lora_alpha=8, use_bdlora={"nblocks": 2, "match_strict": False})
    assert is_merged(folder) is None
    edit_config(folder, use_bdlora=None)
    edit_tensors(folder, lambda tensors: tensors.pop(next(key for key in tensors if "lora_A" in key)))
    assert is_merged(folder) is None


def test_a_part_of_the_merge_is_not_guessed(base, both):
    folder = both(True)
    tensors, old = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    tensors |= {name: old[name] for name in tensors if "layers.0." in name}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert is_merged(folder) is None


def test_quantize_gptq_names_what_it_can_do(both, tmp_path):
    from qwen_vram.checkpoints.adapters.folder import check_no_adapter_beside

    folder = both(False)
    with pytest.raises(qv.AdapterError, match=BOTH + ".*; if it is not, merge it first: ") as caught:
        check_no_adapter_beside(folder)
    call = f"qv.merge_lora_then_quantize({str(folder)!r}, {str(folder)!r}, out)"
    assert call in str(caught.value)
    eval(call, {"qv": qv, "out": tmp_path / "out"})
    check_no_adapter_beside(tmp_path / "out")
    with load(tmp_path / "out", weights="nf4") as llm:
        assert torch.isfinite(logits(llm.model)).all()


def test_a_base_in_the_hubs_cache_tells_too(base, both, tmp_path, monkeypatch):
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    shutil.copytree(base, cache / "models--Some--Base" / "snapshots" / ("0" * 40))
    (cache / "models--Some--Base" / "refs").mkdir()
    (cache / "models--Some--Base" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    folder = both(False, "Some/Base")
    assert is_merged(folder) is False
    edit_config(folder, base_model_name_or_path="Some/Other")
    assert is_merged(folder) is None
