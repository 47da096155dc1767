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


def as_plain(folder: Path, out: Path) -> Path:
    """`folder`, GPTQ's in 4 bits, as a plain checkpoint of the same weights in float32, exact."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    made = {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype.is_floating_point}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes = (tensors[name][:, None] >> SHIFTS[:, None] & 15).flatten(0, 1)
        zeros = (tensors[f"{module}.qzeros"][:, :, None] >> SHIFTS & 15).flatten(1) + 1
        group = tensors[f"{module}.g_idx"].long()
        made[f"{module}.weight"] = ((codes - zeros[group]).float() * made.pop(f"{module}.scales")[group]).T.contiguous()
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    change_config(out, quantization_config=None, dtype="float32")
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


def by_hand(folder: Path, out: Path, *, group_size: int = 128, skipped: tuple[str, ...] = ()) -> Path:
    """`folder`, in 16 bits, with its matrices rounded to 4 bits in GPTQ's layout, but for modules that end so."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    made = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not name.endswith("proj.weight") or module.endswith(skipped or ("none",)):
            made[name] = tensor
            continue
        rows, columns = tensor.shape
        size = columns if group_size < 0 else group_size
        groups = tensor.float().T.reshape(columns // size, size, rows)
        scales = (groups.abs().amax(1) / 7).half()
        codes = ((groups / scales[:, None].float()).round() + 8).clamp(0, 15).reshape(columns, rows).int()
        zeros = torch.full((columns // size, rows // 8, 8), 7, dtype=torch.int32)
        made[f"{module}.qweight"] = (codes.view(-1, 8, rows) << SHIFTS[:, None]).sum(1, dtype=torch.int32)
        made[f"{module}.qzeros"] = (zeros << SHIFTS).sum(-1, dtype=torch.int32)
        made[f"{module}.scales"] = scales
        made[f"{module}.g_idx"] = (torch.arange(columns) // size).int()
    save_file({name: one.contiguous() for name, one in made.items()}, out / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": True}
    change_config(out, quantization_config=settings)
    return out


def change_tensors(folder: Path, change) -> Path:
    """`folder` with its tensors as `change` makes them of a dict by name."""
    path = folder / "model.safetensors"
    save_file({name: one.contiguous() for name, one in change(load_file(path)).items()}, path, {"format": "pt"})
    return folder
