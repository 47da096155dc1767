"""Tensors of an adapter's file, sorted by the module that they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.adapters.folder import WEIGHTS, AdapterPath, adapter_folder
from qwen_vram.checkpoints.adapters.settings import LoraSettings
from qwen_vram.checkpoints.adapters.settings_reader import read_settings
from qwen_vram.checkpoints.files.safetensors_header import read_header
from qwen_vram.dtypes import FLOATS

_PREFIX = "base_model.model."
_FLOATS = tuple(row.stored for row in FLOATS)

# The end of a key, longest first, and the tensor's field. Source: keys that peft 0.21.2 writes.
_ENDINGS = {
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "copied_weight",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".modules_to_save.weight": "saved_twice",
    ".original_module.weight": "untrained",
    ".base_layer.weight": "copied_weight",
    ".base_layer.bias": "bias",
    ".lora_diag": "diagonal",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".weight": "weight",
    ".bias": "bias",
}
# Tensors that VeLoRA and MonteCLoRA use only in training; a forward pass in eval mode does not read them.
# Source: peft 0.21.2, tuners/lora/variants.py.
_IN_TRAINING = re.compile(r"\.lora_velora_embed(\.default)?$|\.lora_monteclora_sampler\.(default\.)?\w+$")
# Parts that wrappers of torch add to the names of modules: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# From a key as it is in a model in memory, which holds the adapter's name "default", to the key that PEFT saves.
_IN_MEMORY = {r"\.modules_to_save\.default\.": ".", r"\.default(?=\.weight$|\.bias$|$)": ""}
# The same for PEFT. A module saved whole may have its wrapper's name in its key; PEFT wants it without.
KEY_MAPPING = {r"\.modules_to_save\.(default\.)?": ".", **_IN_MEMORY}


class AdapterTensor(NamedTuple):
    """One tensor of an adapter's file.

    `name` is its key there, `path` the key without PEFT's prefix and without the adapter's name; `offset` counts from
    the beginning of the file.
    """

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(slots=True)
class ModuleTensors:
    """The tensors of an adapter for one module; the fields are named after PEFT's keys.

    Attributes:
        diagonal: KaSA's factors of the ranks, between `a` and `b`.
        weight: The whole weight, trained (modules_to_save) or saved with a resized vocabulary.
        copied_weight: The base's weight as it was in training, saved because the module is adapted.
        saved_twice: `weight` once more, as PEFT writes it if the vocabulary was resized; alone, it is `weight`.
        untrained: The resized weight that `weight` was trained from; without effect.
    """

    a: AdapterTensor | None = None
    b: AdapterTensor | None = None
    b_bias: AdapterTensor | None = None
    magnitude: AdapterTensor | None = None
    diagonal: AdapterTensor | None = None
    embedding_a: AdapterTensor | None = None
    embedding_b: AdapterTensor | None = None
    weight: AdapterTensor | None = None
    copied_weight: AdapterTensor | None = None
    saved_twice: AdapterTensor | None = None
    untrained: AdapterTensor | None = None
    bias: AdapterTensor | None = None
    tokens: AdapterTensor | None = None

    @property
    def factors(self) -> tuple[AdapterTensor, ...]:
        """The low-rank factors that are there."""
        parts = (self.a, self.b, self.embedding_a, self.embedding_b)
        return tuple(part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter: its folder, settings, and tensors by module path and by key, without those used only in training."""

    folder: Path
    settings: LoraSettings
    modules: Mapping[str, ModuleTensors] = field(repr=False)
    tensors: Mapping[str, AdapterTensor] = field(repr=False)

    @property
    def file(self) -> Path:
        """The file of tensors."""
        return self.folder / WEIGHTS

    def error(self, what: str) -> AdapterError:
        """Return an error about this adapter."""
        return AdapterError(f"adapter {str(self.folder)!r} {what}", path=str(self.file))


def open_adapter(adapter: AdapterPath) -> Adapter:
    """Read an adapter's settings and headers, and check both; no weight is read.

    Args:
        adapter: Folder or hub id.

    Raises:
        AdapterError: there is no adapter, or its files cannot be used.
        CheckpointError: its file of tensors is cut off or corrupt.
        HubError: the hub does not give the files.
    """
    folder = adapter_folder(adapter)
    settings = read_settings(folder)
    tensors = {
        key: AdapterTensor(key, _path_of(key), tensor.dtype, tensor.shape, tensor.nbytes, tensor.offset)
        for key, tensor in read_header(folder / WEIGHTS).items()
        if not _IN_TRAINING.search(key)
    }
    return Adapter(folder=folder, settings=settings, modules=_by_module(folder, tensors), tensors=tensors)


def _path_of(key: str) -> str:
    path = key.removeprefix(_PREFIX)
    for pattern, replacement in _IN_MEMORY.items():
        path, count = re.subn(pattern, replacement, path)
        if count:
            break
    return path


def _by_module(folder: Path, tensors: Mapping[str, AdapterTensor]) -> dict[str, ModuleTensors]:
    """Return the tensors by module; refuse keys that are not known."""
    _check_not_empty(folder, tensors)
    modules: dict[str, ModuleTensors] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if tensor.path.endswith(ending)), "")
        module = tensor.path[: len(tensor.path) - len(ending)]
        inside = ".lora_" in module or ".default." in f"{module}." or any(part in key for part in _WRAPPERS)
        known = ending and key.startswith(_PREFIX) and not inside
        if not known or tensor.dtype not in _FLOATS or not tensor.shape:
            unknown.append(f"{key} ({tensor.dtype} {list(tensor.shape)})")
            continue
        found = modules.setdefault(module, ModuleTensors())
        if getattr(found, _ENDINGS[ending]) is not None:
            unknown.append(f"{key} (a second time)")
        setattr(found, _ENDINGS[ending], tensor)
    for found in modules.values():
        if found.weight is None:
            found.weight, found.saved_twice = found.saved_twice, None
    if unknown:
        raise AdapterError(
            f"adapter {str(folder)!r} holds keys that are not PEFT's: {shortened(unknown)}; PEFT would leave them out "
            f"without an error. Its keys begin with {_PREFIX!r} and end like 'q_proj.lora_A.weight': rename them, or "
            "save the adapter again with PEFT's save_pretrained()",
            path=str(folder / WEIGHTS),
        )
    return modules


def _check_not_empty(folder: Path, tensors: Mapping[str, AdapterTensor]) -> None:
    """Refuse a file without tensors, and tensors without elements."""
    empty = [f"{key} {list(tensor.shape)}" for key, tensor in tensors.items() if not tensor.nbytes]
    if tensors and not empty:
        return
    what = f"holds empty tensors: {shortened(empty)}" if empty else "holds no tensors"
    raise AdapterError(
        f"adapter {str(folder)!r} {what}, so it holds no weights; DeepSpeed ZeRO-3 saves such files without gathering "
        "the weights: save it again with stage3_gather_16bit_weights_on_model_save=true, or make the file from the "
        "training checkpoint with DeepSpeed's zero_to_fp32.py",
        path=str(folder / WEIGHTS),
    )


def shortened(problems: Sequence[str], shown: int = 3) -> str:
    """Return the first problems joined, with the number of the others."""
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    return ", ".join(problems[:shown]) + more
