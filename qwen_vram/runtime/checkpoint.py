"""Checkpoint: a folder of files, checked name by name and shape by shape before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.arithmetic.catalog import catalog_row
from qwen_vram.arithmetic.model import ModelLike
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.stored_checkpoint import checkpoint_architecture
from qwen_vram.errors import CheckpointError, ConfigError
from qwen_vram.files.header import Tensor
from qwen_vram.files.hub import hub_snapshot
from qwen_vram.files.local import read_config, read_tensors

_FLOATS = ("BF16", "F16", "F32")
# A part of a 4-bit matrix by the name that checkpoints give it; the offset is in a JSON text.
# Source: bitsandbytes 0.50.2, functional.py, QuantState.as_dict.
_NAMES = {"code": "quant_map", "state2.absmax": "nested_absmax", "state2.code": "nested_quant_map"}
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
    architecture = checkpoint_architecture(read_config(folder), lambda: read_tensors(folder), source=source)
    if architecture.stored is None:  # otherwise its headers were held against config.json just now
        _check_tensors(folder, architecture)
    return Checkpoint(folder=folder, name=name, architecture=architecture)


def _is_quantized(weight: Weight, architecture: Architecture) -> bool:
    if architecture.stored_format is None or not weight.is_linear:
        return False
    return weight.role != "head" or architecture.stored_head


def _check_quantized(
    weight: Weight, tensor: Tensor, stored: dict[str, Tensor], architecture: Architecture, folder: Path
) -> None:
    """Hold a matrix that is stored quantized against its format: the bytes of its codes, and all that goes beside."""
    name = str(architecture.stored_format)
    codes = FORMATS[name].part_sizes(weight.shape)[0]
    beside = _beside(weight, name)
    missing = next((part for part in beside if part not in stored), None)
    if tensor.nbytes != codes or missing:
        found = f"{tensor.nbytes} bytes" if tensor.nbytes != codes else f"no {missing!r}"
        raise CheckpointError(
            f"{weight.name!r} is not the {name} matrix that config.json says: {codes} bytes of codes with "
            f"{beside[0]!r} are expected, got {found}; download the checkpoint again",
            path=str(folder / tensor.file),
        )


def _beside(weight: Weight, name: str) -> list[str]:
    """What a checkpoint holds beside the codes of a matrix in the format `name`, its scales first."""
    storage = FORMATS[name]
    parts = [part.name for part in storage.parts[1:]]
    if storage.library != "bitsandbytes" or storage.bits != 4:
        return [f"{weight.name.removesuffix('.weight')}.{part}" for part in parts]
    state = f"quant_state.bitsandbytes__{name.removesuffix('-plain')}"
    return [f"{weight.name}.{_NAMES.get(part, part)}" for part in parts if part != "offset"] + [
        f"{weight.name}.{state}"
    ]


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
        elif _is_quantized(weight, architecture):
            _check_quantized(weight, tensor, stored, architecture, folder)
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
