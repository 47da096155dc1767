"""Where every tensor of the output lies: shards, offsets and headers, settled before the first byte is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwen_vram.files.local import SINGLE
from qwen_vram.lora.codec import Codec, Part
from qwen_vram.lora.targets import Target

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# Most bytes that bitsandbytes' packed JSON takes; about 200 do. Measured: bitsandbytes 0.50.2.
_LATE_BYTES = 512


@dataclass(frozen=True, slots=True)
class Slot:
    """One stored tensor: its place in a shard's data. Without a shape its bytes come out last, and lie last."""

    name: str
    kind: str
    shape: tuple[int, ...] | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One merged tensor and the slots that hold it. Without a codec it keeps its dtype, in one slot."""

    target: Target
    slots: tuple[Slot, ...]
    codec: Codec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file.

    Attributes:
        offsets: First byte of each slot, counted in the file.
        header_bytes: Room for the header, its length field included.
        data_end: Where the slots of known size end.
    """

    file: str
    weights: tuple[Weight, ...]
    offsets: dict[str, int]
    header_bytes: int
    data_end: int

    @property
    def slots(self) -> list[Slot]:
        """The slots in the order in which they lie in the file."""
        return in_file_order(slot for weight in self.weights for slot in weight.slots)

    @property
    def largest_size(self) -> int:
        """The most bytes that the file can take; exact but for the packed JSON texts at its end."""
        return self.data_end + sum(_LATE_BYTES for slot in self.slots if slot.shape is None)


def lay_out(weights: Iterable[Weight], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Weights in shards of at most `max_shard_bytes` of data, or of one weight where that one is larger."""
    groups: list[list[Weight]] = []
    room = 0
    for weight in weights:
        size = sum(slot.nbytes for slot in weight.slots)
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(weight)
        room -= size
    if len(groups) == 1:
        return (_shard(SINGLE, tuple(groups[0])),)
    return tuple(
        _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def weight_of(target: Target, codec: Codec | None) -> Weight:
    """The slots that `target` takes in the format of `codec`."""
    if codec is None:
        nbytes = target.base.nbytes // math.prod(target.base.shape) * math.prod(target.shape)
        return Weight(target, (Slot(target.name, target.base.kind, target.shape, nbytes),), None)
    module = target.name.removesuffix(".weight")
    return Weight(target, tuple(_slot(module, part) for part in codec.parts(target.shape)), codec)


def _slot(module: str, part: Part) -> Slot:
    nbytes = _LATE_BYTES if part.shape is None else math.prod(part.shape) * _ITEM_BYTES[part.kind]
    return Slot(f"{module}{part.ending}", part.kind, part.shape, nbytes)


def in_file_order(slots: Iterable[Slot]) -> list[Slot]:
    """Wide dtypes first, so that every tensor is aligned to its items, as safetensors asks; unknown sizes last."""
    return sorted(slots, key=lambda slot: (slot.shape is None, -_ITEM_BYTES.get(slot.kind, 1)))


def _shard(file: str, weights: tuple[Weight, ...]) -> Shard:
    slots = in_file_order(slot for weight in weights for slot in weight.slots)
    # Late tensors are at most this long, so a header that is written for them is long enough for the real one.
    header_bytes = len(header(slots, [slot.nbytes for slot in slots]))
    offsets = {}
    position = header_bytes
    for slot in slots:
        if slot.shape is not None:
            offsets[slot.name] = position
            position += slot.nbytes
    return Shard(file=file, weights=weights, offsets=offsets, header_bytes=header_bytes, data_end=position)


def header(slots: Sequence[Slot], sizes: Sequence[int], *, length: int = 0) -> bytes:
    """The beginning of a safetensors file, padded with spaces to `length` or to a multiple of 8.

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
