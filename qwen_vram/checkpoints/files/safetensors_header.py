"""The header of one safetensors file, checked before anything is allocated.

Only headers are read, never weights, so that a 15 GB checkpoint is checked in milliseconds.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from qwen_vram.dtypes import BY_STORED
from qwen_vram.errors import CheckpointError

# Source: safetensors' format description; the header is refused above 100 MB there too.
_HEADER_LIMIT = 100_000_000
_FETCH = "download the file again, or copy it again from whoever saved it"


class Tensor(NamedTuple):
    """One stored tensor: dtype as safetensors spells it, shape, bytes on disk, and its position in a file.

    `offset` is in bytes from the beginning of the file, or of its data if its header was read on the hub. `name` is the
    tensor's name in that file, which may differ from the name in the model.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int
    name: str


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, from its header.

    Raises:
        CheckpointError: the file is missing, cut off or corrupt.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise _corrupt(path, f"its header of {length} bytes does not fit in {size} bytes")
            header = file.read(length)
    except FileNotFoundError:
        from qwen_vram.checkpoints.files.absent import missing_shard  # only for an error

        raise missing_shard(path) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}; check the file", path=str(path)) from error
    tensors, end = parse_header(header, path.name, source=path)
    if size != 8 + length + end:
        cut = size < 8 + length + end
        what, cure = ("cut off", f"a download or a copy stopped; {_FETCH}") if cut else ("too long", _FETCH)
        raise CheckpointError(
            f"shard {path.name!r} is {what}: {size} bytes on disk, {8 + length + end} in its header; {cure}",
            path=str(path),
        )
    return tensors


def parse_header(header: bytes, file: str, *, source: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors that a safetensors header lists, and the end of their data, in bytes after the header.

    Raises:
        CheckpointError: the header is not JSON, or a tensor's offsets do not match its dtype and shape.
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
    except (ValueError, AttributeError) as error:
        raise _corrupt(source, f"{type(error).__name__} in its header") from error
    return parse_entries(entries, file, source=source, data_at=8 + len(header))


def parse_entries(
    entries: Mapping[str, Any], file: str, *, source: Path, data_at: int = 0
) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a header's entries (dtype, shape, data_offsets by name), and the end of their data.

    Args:
        data_at: First byte of the data in the file.

    Raises:
        CheckpointError: a tensor's offsets do not match its dtype and shape, or leave a hole.
    """
    tensors = {}
    spans = []
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}  # layers have the same dtypes and shapes
    try:
        for name, entry in entries.items():
            dtype, shape, span = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            nbytes = sizes.get((dtype, shape))
            if nbytes is None:
                nbytes = sizes[dtype, shape] = _size(dtype, shape)
            begin, end = span
            if end - begin != nbytes:
                raise _corrupt(source, f"{name!r} of shape {list(shape)} takes {end - begin} bytes in it")
            tensors[name] = Tensor(dtype, shape, nbytes, file, data_at + begin, name)
            spans.append(span)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(source, f"{type(error).__name__} in its header") from error
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _corrupt(source, f"its tensors overlap or leave a hole at byte {position}")
        position = end
    return tensors, position


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor.

    Raises:
        KeyError: the dtype is unknown.
        ValueError: a size is not a whole number from 0 on.
    """
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {list(shape)}")
    return -(-BY_STORED[dtype].bits * prod(shape) // 8)


def _corrupt(path: Path, why: str) -> CheckpointError:
    from qwen_vram.checkpoints.files.contents import beginning_of, mistaken

    beginning = beginning_of(path)
    found = mistaken(beginning)
    if beginning and found:
        return CheckpointError(f"{path.name!r} in {str(path.parent)!r} {found}", path=str(path))
    if not beginning and path.is_file():  # a header that was read on the hub has no file here
        why = "it is empty, for a download or a copy stopped before it began"
    return CheckpointError(f"shard {path.name!r} is corrupt: {why}; {_FETCH}", path=str(path))
