"""Stored tensors of a checkpoint, mapped from its files, with their byte ranges."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_vram.checkpoints.checkpoint import CheckpointFiles
from qwen_vram.runtime.tensors.file_extents import Extent, WeightsFile


def open_weights(path: Path, *, mapped: bool) -> Any:
    """Return an open safetensors file whose tensors are mapped, or read when they are used."""
    from safetensors import safe_open

    return safe_open(path, framework="pt") if mapped else safe_open(path, framework="pt", backend="pread")


class MappedCheckpoint:
    """The tensors of a checkpoint; `stack` keeps its files open.

    Args:
        mapped: Map the files; otherwise each tensor is read when it is used.
    """

    def __init__(self, files: CheckpointFiles, stack: ExitStack, *, mapped: bool) -> None:
        self.folder = files.folder
        self._mapped = mapped
        self._places = files.tensors
        self._names = sorted(self._places)
        self._files = stack
        self._opened: dict[str, Any] = {}
        self._to_read: dict[str, WeightsFile] = {}
        self._given: dict[int, tuple[str, Tensor]] = {}

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Return a module's tensors, by their names in the module."""
        prefix = f"{module}."
        own = takewhile(lambda name: name.startswith(prefix), self._names[bisect_left(self._names, prefix) :])
        return {name.removeprefix(prefix): self._tensor(name) for name in own}

    def piece(self, tensor: Tensor) -> Extent | None:
        """Return the position of a tensor from `tensors`, in any shape; `None` for other tensors."""
        name, given = self._given.get(tensor.data_ptr(), ("", None))
        if given is None or tensor.nbytes != given.nbytes or not tensor.is_contiguous():
            return None
        place = self._places[name]
        if place.file not in self._to_read:
            self._to_read[place.file] = WeightsFile(self.folder / place.file)
        return Extent(self._to_read[place.file], place.offset, place.nbytes)

    def forget(self) -> None:
        """Release the tensors returned so far."""
        self._given.clear()

    def _tensor(self, name: str) -> Tensor:
        file = self._places[name].file
        if file not in self._opened:
            self._opened[file] = self._files.enter_context(open_weights(self.folder / file, mapped=self._mapped))
        found: Tensor = self._opened[file].get_tensor(self._places[name].name)
        self._given[found.data_ptr()] = (name, found)
        return found
