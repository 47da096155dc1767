"""The adapters of a merge, each with its weight in the sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.adapters.folder import AdapterPath
from qwen_vram.checkpoints.adapters.keys import Adapter, AdapterTensor, open_adapter
from qwen_vram.lora.tensor_file import StoredTensor, pieces

AdapterLike = AdapterPath | Sequence[AdapterPath | tuple[AdapterPath, float]] | Mapping[AdapterPath, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedAdapter:
    """One adapter and its factor in the sum."""

    adapter: Adapter
    weight: float

    @property
    def folder(self) -> Path:
        """The adapter's folder."""
        return self.adapter.folder

    def stored(self, tensor: AdapterTensor) -> StoredTensor:
        """Return a tensor of the adapter's file, which is read piece by piece."""
        return StoredTensor(tensor.name, self.adapter.file, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)


def open_adapters(adapter: AdapterLike) -> tuple[WeightedAdapter, ...]:
    """Open the adapters of a merge, and check their settings and headers; no weight is read.

    Args:
        adapter: A folder or hub id, several of them with or without a weight, or a dict from folder to weight.

    Raises:
        AdapterError: the list is empty, a weight is not a number, or an adapter cannot be merged exactly.
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
    return tuple(_open(path, weight) for path, weight in pairs)


def _open(path: AdapterPath, weight: float) -> WeightedAdapter:
    if not isinstance(path, (str, Path)):
        raise AdapterError(
            f"an adapter is a folder, a hub id, or a list or dict of them with weights; got {path!r}", path=str(path)
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or not weight:
        raise AdapterError(
            f"adapter {str(path)!r} has weight {weight!r}; a finite number that is not 0 is needed", path=str(path)
        )
    opened = open_adapter(path)
    reason = opened.settings.unmergeable
    if reason:
        config = str(opened.folder / "adapter_config.json")
        raise AdapterError(f"{config!r}: {reason}", path=config)
    return WeightedAdapter(adapter=opened, weight=float(weight))


def check_finite(one: WeightedAdapter) -> None:
    """Refuse an adapter that contains a NaN or an infinity.

    Raises:
        AdapterError: it contains one.
    """
    for key, tensor in one.adapter.tensors.items():
        stored = one.stored(tensor)
        for start, stop in pieces(stored.num_rows, stored.row_numel):
            if not torch.isfinite(stored.read(start, stop).float()).all():
                raise one.adapter.error(
                    f"holds a NaN or an infinity in {key}; its training diverged, so train it again"
                )
