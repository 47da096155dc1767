"""A checkpoint folder: its config.json, and the headers of all its safetensors.

Nothing here knows what a name or a shape means: that is `arithmetic.architecture`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

from qwen_vram.errors import CheckpointError, ConfigError
from qwen_vram.files.header import Tensor, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# AutoGPTQ's own names: gptq_model-4bit-128g.safetensors, alone or in shards with an index, and its settings in a file
# apart. Source: AutoGPTQ 0.7.1, auto_gptq/modeling/_base.py, save_quantized.
AUTO_GPTQ_SINGLE = "gptq_model-*.safetensors"
AUTO_GPTQ_CONFIG = "quantize_config.json"
# AutoAWQ's settings before it wrote them into config.json. Source: AutoAWQ 0.1.8, awq/models/base.py, save_quantized.
AUTO_AWQ_CONFIG = "quant_config.json"
_AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}


def exists(path: Path) -> bool:
    """Whether there is such a file or folder. A name that is too long for the file system is none."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder."""
    return exists(path) and path.is_dir()


def read_config(folder: Path) -> dict[str, object]:
    """The config.json of `folder`, with AutoGPTQ's or AutoAWQ's settings if those are in a file of their own.

    Raises:
        ConfigError: a file is missing, is not UTF-8, is cut off, or is not a JSON object.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ConfigError(
            f"no {CONFIG} in {str(folder)!r}; point to the folder that holds {CONFIG} and *.safetensors",
            source=str(path),
        )
    config = _read_json(path)
    for name, add in ((AUTO_GPTQ_CONFIG, with_auto_gptq), (AUTO_AWQ_CONFIG, with_auto_awq)):
        if (folder / name).is_file():
            config = add(config, _read_json(folder / name))
    return config


def with_auto_gptq(config: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """`config` with AutoGPTQ's `settings` as its `quantization_config`, unless it has one."""
    return {"quantization_config": {"quant_method": "gptq", **settings}, **config}


def with_auto_awq(config: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """`config` with the `settings` of an older AutoAWQ as its `quantization_config`, unless it has one."""
    named = {_AWQ_KEYS.get(key, key): value for key, value in settings.items()}
    return {"quantization_config": {"quant_method": "awq", **named}, **config}


def _read_json(path: Path) -> dict[str, object]:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}; download the file again", source=str(path)) from error
    return parse_config(text, source=str(path))


def parse_config(text: str, *, source: str) -> dict[str, object]:
    """The JSON object in `text`.

    Raises:
        ConfigError: `text` is not JSON, is cut off, or is not an object.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        what = "is cut off" if error.pos >= len(text.rstrip()) - 1 else "is not JSON"
        raise ConfigError(
            f"{source!r} {what} (line {error.lineno}: {error.msg}); download the file again", source=source
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{source!r} holds a JSON {type(config).__name__}, not an object; a model's config.json is needed",
            source=source,
        )
    return cast("dict[str, object]", config)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, from the headers of its safetensors files.

    Raises:
        CheckpointError: there are no safetensors, a file is missing, cut off or corrupt, the index is broken or names
            a file outside the folder, or a tensor is not where the index says.
    """
    weights = weights_file(folder)
    if weights.name.endswith(".json"):
        return indexed_tensors(weights, lambda file: read_header(folder / file))
    return read_header(weights)


def weights_file(folder: Path) -> Path:
    """The index of the checkpoint in `folder`, or its one file of weights.

    Raises:
        CheckpointError: there is none.
    """
    for name in (INDEX, SINGLE):
        if (folder / name).exists():
            return folder / name
    for pattern in (f"{AUTO_GPTQ_SINGLE}.index.json", AUTO_GPTQ_SINGLE):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise _no_safetensors(folder)


def has_weights(folder: Path) -> bool:
    """Whether `folder` has a file or an index of weights."""
    try:
        return weights_file(folder).exists()
    except CheckpointError:
        return False


def indexed_tensors(index: Path, read: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor of the shards that `index` names; `read` brings one shard's.

    Raises:
        CheckpointError: the index is broken or names a file outside its folder, or a tensor is not where it says.
    """
    weight_map = _read_index(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        tensors |= read(file)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{index.name} says that {name!r} is in {file!r}, which does not hold it; download the checkpoint "
                "again",
                path=str(index),
            )
    return tensors


def _no_safetensors(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{str(folder)!r} holds only pickle files ({', '.join(pickles[:3])}), which can run code when they are "
            "opened; only safetensors are read. Where you trust the file, convert it once with: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f'M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + "-safetensors"!r})"',
            path=str(folder / pickles[0]),
        )
    return CheckpointError(
        f"no safetensors in {str(folder)!r}; {SINGLE} or {INDEX} with its shards is needed", path=str(folder)
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a safetensors index with a weight_map ({type(error).__name__}); "
            "download the file again",
            path=str(path),
        ) from error
    for file in pairs.values():
        # Names come from a downloaded file, so they may only be plain names inside the folder.
        if file != Path(file).name or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{str(path)!r} points outside its folder: {file!r}; every shard must be a plain file name",
                path=str(path),
            )
    return pairs
