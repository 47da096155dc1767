"""Checkpoint: a folder of files, checked name by name and shape by shape before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.catalog import catalog_row
from qwen_vram.arithmetic.model import ModelLike
from qwen_vram.arithmetic.stored_checkpoint import checkpoint_architecture
from qwen_vram.errors import CheckpointError, ConfigError
from qwen_vram.files.hub import hub_snapshot
from qwen_vram.files.local import read_config, read_tensors

_FLOATS = ("BF16", "F16", "F32")
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint: its folder, its name, and the shape of its model."""

    folder: Path
    name: str
    architecture: Architecture


def open_checkpoint(model: ModelLike) -> Checkpoint:
    """The checked files of `model`: a folder, a catalog name or a hub id, downloaded where it is not here yet.

    Raises:
        ConfigError: `model` has no files (a dict, an `Architecture`), or its config.json cannot be used.
        CheckpointError: safetensors are missing, cut off, corrupt, or hold other names or shapes than config.json says.
        HubError: the hub does not give the files.
    """
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"load() needs weights: a checkpoint folder, a catalog name or a hub id, got a {type(model).__name__}"
        )
    folder = Path(model)
    name = folder.name
    if not folder.is_dir():
        row = catalog_row(str(model))
        name = row.repo_id if row else str(model)
        folder = hub_snapshot(name)
    source = str(folder / "config.json")
    architecture = checkpoint_architecture(
        read_config(folder), lambda: read_tensors(folder), source=source, headers_here=True
    )
    if architecture.stored_format is None:  # otherwise its headers were held against config.json just now
        _check_tensors(folder, architecture)
    return Checkpoint(folder=folder, name=name, architecture=architecture)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint; without any files it is one that knows no words.

    Raises:
        CheckpointError: its files are broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} cannot be read ({type(error).__name__}: {error}); download "
            "tokenizer.json and tokenizer_config.json again",
            path=str(folder),
        ) from error


def _check_tensors(folder: Path, architecture: Architecture) -> None:
    stored = read_tensors(folder)
    missing = []
    for weight in architecture.weights():
        tensor = stored.get(weight.name)
        if tensor is None:
            missing.append(weight.name)
        elif tensor.shape != weight.shape:
            raise CheckpointError(
                f"{weight.name!r} has shape {list(tensor.shape)} in {tensor.file!r}, config.json says "
                f"{list(weight.shape)}; config.json and weights are of different models",
                path=str(folder / tensor.file),
            )
        elif tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{weight.name!r} is stored as {tensor.dtype}; {', '.join(_FLOATS)} are read, and quantized while they "
                "load",
                path=str(folder / tensor.file),
            )
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"{str(folder)!r} lacks {', '.join(missing[:_SHOWN])}{more}; download the checkpoint again",
            path=str(folder),
        )
