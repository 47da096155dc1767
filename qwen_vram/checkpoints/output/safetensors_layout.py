"""Layout of a new checkpoint: shards, offsets and headers, computed before writing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from qwen_vram.checkpoints.files.names import SINGLE
from qwen_vram.dtypes import BY_STORED

# Most bytes of bitsandbytes' packed JSON, which takes about 200. Measured: bitsandbytes 0.50.2.
LATE_BYTES = 512
# Bytes for the index, the report and the folder itself; far more than they take.
_SMALL_FILES = 2**22


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One stored tensor in a shard's data. A tensor without a shape is computed last, and is last in the file."""

    name: str
    kind: str
    shape: tuple[int, ...] | None
    nbytes: int


class Slotted(Protocol):
    """A weight with the other tensors of its format, which stay in one file."""

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        """The tensors of the weight."""


T = TypeVar("T", bound=Slotted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Generic[T]):
    """One safetensors file.

    Attributes:
        weights: Its weights, in the order in which they are written.
        offsets: First byte of each slot, counted in the file.
        header_bytes: Bytes reserved for the header, its length field included.
        data_end: The end of the slots of known size, in bytes of the file.
    """

    file: str
    weights: tuple[T, ...]
    offsets: dict[str, int]
    header_bytes: int
    data_end: int

    @property
    def slots(self) -> list[TensorSlot]:
        """The slots in the order of the file."""
        return in_file_order(slot for weight in self.weights for slot in weight.slots)

    @property
    def largest_size(self) -> int:
        """The most bytes that the file can take; exact except for the packed JSON texts at its end."""
        return self.data_end + sum(LATE_BYTES for slot in self.slots if slot.shape is None)


def lay_out(weights: Iterable[T], max_shard_bytes: int) -> tuple[Shard[T], ...]:
    """Return the weights in shards of at most `max_shard_bytes` of data; a larger weight has a shard of its own."""
    groups: list[list[T]] = []
    left = 0
    for weight in weights:
        size = sum(slot.nbytes for slot in weight.slots)
        if not groups or size > left:
            groups.append([])
            left = max_shard_bytes
        groups[-1].append(weight)
        left -= size
    if len(groups) == 1:
        return (_shard(SINGLE, tuple(groups[0])),)
    return tuple(
        _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def disk_bytes(shards: Iterable[Shard[T]], files: Iterable[Path], config: str) -> int:
    """Return the most bytes that `shards`, copies of `files` and `config` take; too high by a few MiB at most."""
    copied = sum(path.stat().st_size for path in files)
    return sum(shard.largest_size for shard in shards) + copied + len(config) + _SMALL_FILES


def in_file_order(slots: Iterable[TensorSlot]) -> list[TensorSlot]:
    """Return the slots with wide dtypes first, so that tensors are aligned for safetensors, and unknown sizes last."""
    return sorted(slots, key=lambda slot: (slot.shape is None, -BY_STORED[slot.kind].nbytes))


def _shard(file: str, weights: tuple[T, ...]) -> Shard[T]:
    slots = in_file_order(slot for weight in weights for slot in weight.slots)
    # Late tensors have at most these sizes, so a header for these sizes is long enough for the real one.
    header_bytes = len(header(slots, [slot.nbytes for slot in slots]))
    offsets = {}
    position = header_bytes
    for slot in slots:
        if slot.shape is not None:
            offsets[slot.name] = position
            position += slot.nbytes
    return Shard(file=file, weights=weights, offsets=offsets, header_bytes=header_bytes, data_end=position)


def header(slots: Sequence[TensorSlot], sizes: Sequence[int], *, length: int = 0) -> bytes:
    """Return the beginning of a safetensors file, padded with spaces to `length` or to a multiple of 8.

    Source: safetensors' format description: 8 bytes of length, then JSON.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for slot, size in zip(slots, sizes, strict=True):
        shape = [size] if slot.shape is None else list(slot.shape)
        entries[slot.name] = {"dtype": slot.kind, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(length - 8 if length else -(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
