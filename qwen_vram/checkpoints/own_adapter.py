"""Detection of an adapter that is already merged into the model of its own folder."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from qwen_vram.checkpoints.adapters.changes import Change, Factors, changes_of, check_layers
from qwen_vram.checkpoints.adapters.folder import WEIGHTS
from qwen_vram.checkpoints.adapters.kept_tensors import base_of
from qwen_vram.checkpoints.adapters.keys import AdapterTensor, open_adapter
from qwen_vram.checkpoints.checkpoint import CheckpointFiles, read_checkpoint
from qwen_vram.checkpoints.files.names import CONFIG
from qwen_vram.checkpoints.files.place import is_hub_id
from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.files.same_bytes import same_bytes
from qwen_vram.checkpoints.hub.files import hub_cached
from qwen_vram.dtypes import BF16, FP16, FP32, FP64
from qwen_vram.errors import QwenVramError

# A merge holds the whole update except for rounding. These are limits on its share of the update, and on the rest.
# Measured: bf16 merges by PEFT in tests/lora/test_own_adapter.py and of the bundled adapter, over whole matrices.
# They have shares of 0.999 to 1.002 and leave 0.002 to 0.064 of the update. CPU, torch 2.13.0, peft 0.21.2, 2026-11-30.
_SHARE = (0.9, 1.1)
_REST = 0.5
# Number of rows, and of columns in each row, that are compared with the update.
_SAMPLES = 64
# Formats of struct for an element.
_LETTERS = {FP16.stored: "<e", FP32.stored: "<f", FP64.stored: "<d"}


def is_merged(folder: Path) -> bool | None:
    """Tell if the adapter in `folder` is merged into the model there; `None` if that cannot be told.

    Three of the adapted matrices are compared with those of the base, if the base is in another local folder. Equal
    bytes mean that the adapter is not merged. A difference by the update means that it is merged.
    """
    try:
        adapter = open_adapter(folder)
        base = _base(adapter.settings.trained_on, folder)
        if base is None:
            return None
        here, there = read_checkpoint(folder, weights=True), read_checkpoint(base, weights=True)
        shapes = base_of(folder.name, here.architecture)
        check_layers(adapter, shapes)
        changes = changes_of(adapter, shapes)
    except QwenVramError:
        return None
    matrices = _matrices(changes, here, there)
    same = [matrix.is_the_bases() for matrix in matrices]
    if not matrices:
        return None
    if all(same):
        return False
    if any(same) or adapter.settings.unmergeable or adapter.settings.use_dora:
        return None
    return True if all(matrix.holds_update(folder) for matrix in matrices) else None


def _base(named: str, folder: Path) -> Path | None:
    """Return the base's folder on this machine; `None` if it is not here, or is `folder` itself."""
    base = Path(named).expanduser()
    if named and (base / CONFIG).is_file():
        return None if base.resolve() == folder.resolve() else base
    return hub_cached(named) if is_hub_id(named) else None


class _Matrix(NamedTuple):
    """An adapted matrix in its file, the same matrix of the base, and the factors of its update."""

    file: Path
    tensor: Tensor
    base_file: Path
    base: Tensor
    factors: Factors

    def is_the_bases(self) -> bool:
        """Tell if the two matrices are equal, byte for byte."""
        return same_bytes(self.file, self.tensor.offset, self.base_file, self.base.offset, self.tensor.nbytes)

    def holds_update(self, adapter: Path) -> bool:
        """Tell if the matrix is the base's with the update added."""
        factors, (height, width) = self.factors, self.tensor.shape
        rows, columns = (range(0, size, -(-size // _SAMPLES)) for size in (height, width))
        a = [_row(adapter / WEIGHTS, factors.a, rank, columns) for rank in range(factors.a.shape[0])]
        products = updates = rests = 0.0
        for row in rows:
            b = _row(adapter / WEIGHTS, factors.b, row, range(len(a)))
            here, there = _row(self.file, self.tensor, row, columns), _row(self.base_file, self.base, row, columns)
            for column, values in enumerate(zip(*a, strict=True)):
                update = factors.scale * sum(one * other for one, other in zip(b, values, strict=True))
                found = here[column] - there[column]
                products += found * update
                updates += update * update
                rests += (found - update) ** 2
        return updates > 0 and _SHARE[0] < products / updates < _SHARE[1] and rests < _REST**2 * updates


def _matrices(changes: Mapping[str, Change], here: CheckpointFiles, there: CheckpointFiles) -> list[_Matrix]:
    """Return the first, middle and last adapted matrix; empty if one cannot be compared with the base's."""
    names = [name for name, change in changes.items() if change.factors is not None and not change.factors.embedding]
    found = []
    for name in sorted({names[0], names[len(names) // 2], names[-1]} if names else ()):
        factors, one, other = changes[name].factors, here.tensors.get(name), there.tensors.get(name)
        if factors is None or one is None or other is None or one[:2] != other[:2]:
            return []
        if not {one.dtype, factors.a.dtype, factors.b.dtype} <= {BF16.stored, *_LETTERS}:
            return []
        found.append(_Matrix(here.folder / one.file, one, there.folder / other.file, other, factors))
    return found


def _row(path: Path, tensor: Tensor | AdapterTensor, row: int, columns: Iterable[int]) -> list[float]:
    """Return some columns of one row of a matrix, read from its file."""
    width = tensor.shape[1]
    size = tensor.nbytes // (tensor.shape[0] * width)
    with path.open("rb") as file:
        file.seek(tensor.offset + row * width * size)
        stored = file.read(width * size)
    return [_number(tensor.dtype, stored[column * size : (column + 1) * size]) for column in columns]


def _number(dtype: str, stored: bytes) -> float:
    if dtype == BF16.stored:  # the upper half of a float32
        dtype, stored = FP32.stored, bytes(2) + stored
    return float(struct.unpack(_LETTERS[dtype], stored)[0])
