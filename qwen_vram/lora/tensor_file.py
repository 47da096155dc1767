"""Tensors on disk, read piece by piece with bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from qwen_vram.checkpoints.checkpoint import CheckpointFiles
from qwen_vram.errors import CheckpointError
from qwen_vram.lora.codecs.scratch import scratch
from qwen_vram.runtime.torch_dtypes import TORCH_DTYPES

# The most elements that are read, merged and written at a time: 4 MiB in float32. With smaller pieces, BLAS packs the
# factors of a wide matrix too often. Larger pieces do not fit the processor's cache.
PIECE = 2**20

# The fewest rows of a piece. Below 16 rows BLAS uses other kernels, which round differently.
# Measured: MKL on AVX-512, torch 2.13; pieces of 16 rows and more equal the rows of the whole product bit for bit.
SMALLEST_PIECE_ROWS = 32


# Bytes that the system is asked to fetch at a time: no disk is known whose largest request is smaller.
_FETCHED = 2**20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file: its position, and methods that read rows of it.

    Attributes:
        kind: The dtype as safetensors spells it.
        offset: First byte in the file.
    """

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a floating-point tensor."""
        return TORCH_DTYPES[self.kind]

    @property
    def num_rows(self) -> int:
        """Rows of a matrix, elements of a vector."""
        return self.shape[0]

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    def read(self, start: int = 0, stop: int | None = None, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows `start` to `stop` as they are stored, `(stop - start, *shape[1:])`, on the CPU.

        Args:
            into: A contiguous tensor of that shape and dtype to fill.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        stop = self.num_rows if stop is None else stop
        row_bytes = self.nbytes // self.num_rows
        shape = (stop - start, *self.shape[1:])
        rows = torch.empty(shape, dtype=self.dtype, device="cpu") if into is None else into
        read_into(self.path, rows, self.offset + start * row_bytes)
        return rows

    def read_bytes(self, start: int, stop: int) -> torch.Tensor:
        """Return bytes `start` to `stop` of the tensor as uint8, valid until this thread's next call.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        piece = scratch("bytes", (stop - start,), torch.uint8)
        read_into(self.path, piece, self.offset + start)
        return piece

    def announce(self) -> None:
        """Ask the system to read the tensor from the disk in the background, if it supports that.

        Linux reads at most one request of the disk, some megabytes, for a call: mm/readahead.c,
        force_page_cache_ra.
        """
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb", buffering=0) as file:
                for start in range(0, self.nbytes, _FETCHED):
                    size = min(_FETCHED, self.nbytes - start)
                    os.posix_fadvise(file.fileno(), self.offset + start, size, os.POSIX_FADV_WILLNEED)

    def float32(self, device: torch.device, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `start` to `stop` in float32 on `device`."""
        return self.read(start, stop).to(device).float()


def stored_tensors(files: CheckpointFiles) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint, by the model's name."""
    return {
        name: StoredTensor(name, files.folder / tensor.file, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
        for name, tensor in files.tensors.items()
    }


def read_into(path: Path, rows: torch.Tensor, offset: int) -> None:
    """Fill `rows` (contiguous, on the CPU) with the bytes of `path` from `offset` on.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    into = rows.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < len(into):
                count = os.preadv(file.fileno(), [into[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{str(path)!r} became shorter while it was read; check the file", path=str(path)
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}; check the file", path=str(path)) from error


def pieces(num_rows: int, row_numel: int, *, step: int = 1) -> list[tuple[int, int]]:
    """Return the pieces of a tensor: first row and row after the last, of nearly equal sizes up to `PIECE` elements.

    Every piece except the last has a multiple of `step` rows. Wide rows and large steps make larger pieces.

    >>> pieces(2048, 1024)
    [(0, 1024), (1024, 2048)]
    """
    rows = max(PIECE // max(row_numel, 1), 2 * SMALLEST_PIECE_ROWS, 2 * step)
    units = -(-num_rows // step)
    count = -(-num_rows // rows)
    bounds = [min(units * index // count * step, num_rows) for index in range(count + 1)]
    return list(pairwise(bounds))


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Tell if two tensors have the same dtype, shape and bytes."""
    if (first.kind, first.shape) != (second.kind, second.shape):
        return False
    if (first.path, first.offset) == (second.path, second.offset):
        return True
    return all(
        torch.equal(first.read_bytes(start, stop).clone(), second.read_bytes(start, stop))
        for start, stop in byte_pieces(first.nbytes)
    )


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Tell if two tensors have the same shape and, in float32, the same values."""
    return first.shape == second.shape and all(
        torch.equal(first.read(start, stop).float(), second.read(start, stop).float())
        for start, stop in pieces(first.num_rows, first.row_numel)
    )


def byte_pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield bytes of a tensor in pieces of twice `PIECE`."""
    for start in range(0, nbytes, 2 * PIECE):
        yield start, min(start + 2 * PIECE, nbytes)
