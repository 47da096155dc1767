"""A checkpoint of GPTQModel's in the clothes that other libraries gave theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# The column that each place of a word holds. Source: AutoAWQ 0.2.9, awq/utils/packing_utils.py, AWQ_ORDER.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def change_config(folder: Path, **changes: object) -> None:
    """Change entries of config.json; `None` takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def as_auto_gptq(folder: Path, out: Path, *, shards: int = 1) -> Path:
    """`folder` as AutoGPTQ 0.7 saved it: its own file names and settings, and a bias of zeros for every matrix."""
    shutil.copytree(folder, out)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(out, quantization_config=None)
    own = {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym")}
    own |= {"damp_percent": 0.01, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}
    (out / "quantize_config.json").write_text(json.dumps(own))
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors.setdefault(name.replace(".scales", ".bias"), torch.zeros(tensors[name].shape[1], dtype=torch.float16))
    base = f"gptq_model-{own['bits']}bit-{own['group_size']}g"
    if shards == 1:
        save_file(tensors, out / f"{base}.safetensors", metadata={"format": "pt"})
        return out
    names = sorted(tensors)
    files = {name: f"{base}-{1 + number % shards:05}-of-{shards:05}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, out / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (out / f"{base}.safetensors.index.json").write_text(json.dumps(index))
    return out


def as_awq(folder: Path, out: Path) -> Path:
    """`folder`, GPTQ's in 4 bits, with the same codes in AWQ's layout: the same weights."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    made = {name: tensor for name, tensor in tensors.items() if not name.endswith(("qweight", "qzeros", "g_idx"))}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes = (tensors[name][:, None] >> SHIFTS[:, None] & 15).flatten(0, 1)
        zeros = (tensors[f"{module}.qzeros"][:, :, None] >> SHIFTS & 15).flatten(1) + 1
        made |= {name: packed(codes), f"{module}.qzeros": packed(zeros)}
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    change_config(out, quantization_config=settings)
    return out


def packed(codes: torch.Tensor) -> torch.Tensor:
    """(rows, columns) codes as (rows, columns / 8) words."""
    words = codes.view(len(codes), -1, 8)[:, :, AWQ_ORDER]
    return (words << SHIFTS).sum(-1, dtype=torch.int32)


def tied(folder: Path, out: Path) -> Path:
    """The same checkpoint with its table as its head."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    change_config(out, tie_word_embeddings=True)
    return out
