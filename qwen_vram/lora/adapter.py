"""An adapter: its settings, its weight in the sum, and its tensors by the module that they belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qwen_vram.files.hub import hub_snapshot
from qwen_vram.lora.errors import AdapterError
from qwen_vram.lora.settings import LoraSettings, read_settings
from qwen_vram.lora.stored import TORCH_DTYPES, StoredTensor, pieces, stored_in_file

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."

AdapterPath = str | Path
AdapterLike = AdapterPath | Sequence[AdapterPath | tuple[AdapterPath, float]] | Mapping[AdapterPath, float]

# The end of a key, longest first, and what the tensor is for. Source: keys that peft 0.21.2 writes.
_ENDINGS = {
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "copied_weight",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".modules_to_save.weight": "saved_twice",
    ".original_module.weight": "untrained",
    ".base_layer.weight": "copied_weight",
    ".base_layer.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".weight": "weight",
    ".bias": "bias",
}


@dataclass(slots=True)
class ModuleTensors:
    """What an adapter holds for one module; the fields are named after PEFT's keys.

    Attributes:
        weight: The whole weight, trained (modules_to_save) or saved with a resized vocabulary.
        copied_weight: The base's weight as it was in training, saved because the module is adapted.
        saved_twice: `weight` once more, as PEFT writes it where the vocabulary was resized.
        untrained: The resized weight that `weight` was trained from; without effect.
    """

    a: StoredTensor | None = None
    b: StoredTensor | None = None
    b_bias: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    embedding_a: StoredTensor | None = None
    embedding_b: StoredTensor | None = None
    weight: StoredTensor | None = None
    copied_weight: StoredTensor | None = None
    saved_twice: StoredTensor | None = None
    untrained: StoredTensor | None = None
    bias: StoredTensor | None = None
    tokens: StoredTensor | None = None

    @property
    def adapted(self) -> bool:
        """Whether there is any low-rank factor."""
        return any(part is not None for part in (self.a, self.b, self.embedding_a, self.embedding_b))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter. `weight` is its factor in the sum; `modules` holds its tensors by module path."""

    folder: Path
    weight: float
    settings: LoraSettings
    modules: Mapping[str, ModuleTensors] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def path(self) -> str:
        """The file of tensors."""
        return str(self.folder / WEIGHTS)

    def error(self, what: str) -> AdapterError:
        """An error about this adapter."""
        return AdapterError(f"adapter {str(self.folder)!r} {what}", path=self.path)


def open_adapters(adapter: AdapterLike) -> tuple[Adapter, ...]:
    """The adapters, their settings and headers checked; no weight is read.

    Args:
        adapter: A folder or hub id, several of them with or without a weight, or a dict from folder to weight.

    Raises:
        AdapterError: there is none, a weight is not a number, or an adapter's files cannot be used.
        HubError: the hub does not give the files.
    """
    if isinstance(adapter, (str, Path)):
        pairs: list[tuple[AdapterPath, float]] = [(adapter, 1.0)]
    elif isinstance(adapter, Mapping):
        pairs = list(adapter.items())
    else:
        pairs = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in adapter]
    if not pairs:
        raise AdapterError("no adapter to merge: got an empty list; pass a folder, or folders with weights", path="")
    return tuple(_open_adapter(path, weight) for path, weight in pairs)


def _open_adapter(path: AdapterPath, weight: float) -> Adapter:
    if not isinstance(path, (str, Path)):
        raise AdapterError(
            f"an adapter is a folder, a hub id, or a list or dict of them with weights; got {path!r}", path=str(path)
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or not weight:
        raise AdapterError(
            f"adapter {str(path)!r} has weight {weight!r}; a finite number that is not 0 is needed", path=str(path)
        )
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise AdapterError(
                f"no adapter folder {str(path)!r}; point to the folder that PEFT's save_pretrained() wrote, or pass a "
                "hub id 'organisation/name'",
                path=str(path),
            )
        folder = hub_snapshot(str(path))
    settings = read_settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    tensors = stored_in_file(folder / WEIGHTS)
    modules = _by_module(folder, tensors)
    return Adapter(folder=folder, weight=float(weight), settings=settings, modules=modules, tensors=tensors)


def _no_weights(folder: Path) -> AdapterError:
    if (folder / PICKLE).exists():
        return AdapterError(
            f"{str(folder)!r} holds only {PICKLE}, a pickle, which can run code when it is opened; only {WEIGHTS} is "
            'read. Where you trust the file, convert it once with: python -c "import torch; from safetensors.torch '
            f"import save_file; save_file(torch.load({str(folder / PICKLE)!r}, weights_only=True), "
            f'{str(folder / WEIGHTS)!r})"',
            path=str(folder / PICKLE),
        )
    return AdapterError(
        f"no {WEIGHTS} in {str(folder)!r}; point to the folder that PEFT's save_pretrained() wrote", path=str(folder)
    )


def _by_module(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, ModuleTensors]:
    """The tensors by module; every key has to be understood."""
    modules: dict[str, ModuleTensors] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), "")
        module = key[len(_PREFIX) : len(key) - len(ending)]
        empty = not tensor.shape or not tensor.nbytes
        if not ending or not key.startswith(_PREFIX) or ".lora_" in module or tensor.kind not in TORCH_DTYPES or empty:
            unknown.append(f"{key} ({tensor.kind} {list(tensor.shape)})")
            continue
        found = modules.setdefault(module, ModuleTensors())
        if getattr(found, _ENDINGS[ending]) is not None:
            unknown.append(f"{key} (a second time)")
        setattr(found, _ENDINGS[ending], tensor)
    if unknown or not modules:
        what = f"holds keys that are not PEFT's: {shortened(unknown)}" if unknown else "holds no tensors"
        raise AdapterError(
            f"adapter {str(folder)!r} {what}; save it again with PEFT's save_pretrained()", path=str(folder / WEIGHTS)
        )
    return modules


def shortened(problems: Sequence[str], shown: int = 3) -> str:
    """The first problems, and how many more there are."""
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    return ", ".join(problems[:shown]) + more


def check_finite(adapter: Adapter) -> None:
    """Refuse an adapter with a NaN or an infinity in it.

    Raises:
        AdapterError: there is one.
    """
    for key, tensor in adapter.tensors.items():
        for start, stop in pieces(tensor.num_rows, tensor.row_numel):
            if not torch.isfinite(tensor.read(start, stop)).all():
                raise adapter.error(f"holds a NaN or an infinity in {key}; its training diverged, so train it again")
