"""torch's default dtype, as other code of the process may have set it, changes no tensor and no answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwen_vram as qv
from qwen_vram.runtime.backends.bnb_state import quantization_tensors
from tests.conftest import make_checkpoint

pytest.importorskip("bitsandbytes")

KNOBS = {
    "nf4": {"weights": "nf4", "lm_head": "nf4"},
    "nf4, streamed": {"weights": "nf4", "streamed_layers": 2, "attention": "fused", "cache": "preallocated"},
    "int8": {"weights": "int8", "lm_head": "int8"},
    "int8-wo, KV cache in int8": {
        "weights": "int8-wo", "kv_cache": "int8", "attention": "fused", "cache": "preallocated",
    },
}  # fmt: skip


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    dtype: torch.dtype = request.param
    torch.set_default_dtype(dtype)
    yield dtype
    torch.set_default_dtype(torch.float32)


def seen(folder: Path, knobs: dict) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Two answers, and the tensors of every quantization state."""
    with qv.load(folder, profile="default", device="cpu", progress=False, max_new_tokens=8, **knobs) as llm:
        answers = [llm.generate(text, max_new_tokens=8, do_sample=False) for text in ("one two", "red green blue")]
        states = {
            f"{name} {part}": tensor.clone()
            for name, module in llm.model.named_modules()
            for part, tensor in quantization_tensors(module).items()
        }
    return answers, states


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], indirect=True, ids=str)
@pytest.mark.parametrize("kind", KNOBS)
def test_a_load_makes_the_same_tensors(untied, kind, default):
    answers, states = seen(untied, KNOBS[kind])
    assert torch.get_default_dtype() == default
    torch.set_default_dtype(torch.float32)
    expected_answers, expected = seen(untied, KNOBS[kind])
    assert answers == expected_answers
    assert bool(states) == ("wo" not in kind)
    assert {name: tensor.dtype for name, tensor in states.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(states[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], indirect=True, ids=str)
def test_a_merge_writes_the_same_bytes(untied, adapter, tmp_path, default):
    written = []
    for name in (default, torch.float32):
        torch.set_default_dtype(name)
        out = tmp_path / str(name)
        qv.merge_lora_then_quantize(untied, adapter, out, quantize="nf4", device="cpu", progress=False)
        assert torch.get_default_dtype() == name
        written.append(load_file(next(out.glob("*.safetensors"))))
    found, expected = written
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        key: tensor.dtype for key, tensor in expected.items()
    }
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_failed_load_gives_the_dtype_back(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "small", num_hidden_layers=1)

    def fail(model):
        raise RuntimeError("no fused layers today")

    monkeypatch.setattr("qwen_vram.runtime.loading.load.fuse_layers", fail)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(RuntimeError, match="today"):
            qv.load(folder, profile="default", kernels="fused", device="cpu", progress=False)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
