"""Tiny bases, adapters that PEFT wrote, and what PEFT makes of them: the oracle of the merge tests."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
IDS = torch.arange(3, 40)[None]


def make_base(folder: Path, *, kind: str = "qwen2", tied: bool = False, dtype=torch.bfloat16, **shape: int) -> Path:
    """A base of random weights and biases."""
    torch.manual_seed(7)
    shape = {**SHAPE, **({"head_dim": 24} if kind == "qwen3" else {}), **shape}
    config = Qwen3Config(**shape) if kind == "qwen3" else Qwen2Config(**shape)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype=torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def make_adapter(
    base: Path, folder: Path, *, seed: int = 0, size: float = 0.05, resize: int = 0, save: Any = "auto", **settings: Any
) -> Path:
    """An adapter that PEFT made for `base`, all that it trains at random values, saved by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=size)
        model.save_pretrained(folder, save_embedding_layers=save)
    return folder


def peft_model(base: Path, *adapters: Path, resize: int = 0) -> Any:
    """The base in float32 with the adapters on it, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
        for number, adapter in enumerate(adapters[1:], 1):
            model.load_adapter(adapter, adapter_name=str(number))
        if len(adapters) > 1:
            model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return model.eval()


def peft_merged(model: Any) -> Any:
    """PEFT's own merge in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.merge_and_unload()


def rounded_tensors(model: Any, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """The model's tensors rounded once."""
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, from its files alone."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert not set(names) & set(found)
            found |= {name: opened.get_tensor(name) for name in names}
    return found


def untied_twin(base: Path, folder: Path) -> Path:
    """The same base with a head of its own: what PEFT needs to merge both sides of tied embeddings apart."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit, names and dtypes included."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        different = int((ours[name] != tensor).sum())
        assert different == 0, f"{name}: {different} of {tensor.numel()} differ"


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(adapter: Path, change: Any) -> None:
    """Apply `change` to the adapter's dict of tensors."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()
