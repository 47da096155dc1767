"""A checkpoint folder's config.json and safetensors headers, checked before anything is allocated.

Only headers are read, never weights, so that a 15 GB checkpoint is checked in milliseconds. Nothing here knows what a
name or a shape means: that is `arithmetic.architecture`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, cast

from qwen_vram.errors import CheckpointError, ConfigError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Source: safetensors' format description; the header is refused above 100 MB there too.
_HEADER_LIMIT = 100_000_000
_DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "C64": 64,
}  # fmt: skip


class Tensor(NamedTuple):
    """One stored tensor: dtype as safetensors spells it, shape, bytes on disk, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


def read_config(folder: Path) -> dict[str, object]:
    """The config.json of `folder`.

    Raises:
        ConfigError: the file is missing, is not UTF-8, is cut off, or is not a JSON object.
    """
    path = folder / CONFIG
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no {CONFIG} in {str(folder)!r}; point to the folder that holds {CONFIG} and *.safetensors",
            source=str(path),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}; download the file again", source=str(path)) from error
    return parse_config(text, source=str(path))


def parse_config(text: str, *, source: str) -> dict[str, object]:
    """The JSON object in `text`.

    Raises:
        ConfigError: `text` is not JSON, is cut off, or is not an object.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        what = "is cut off" if error.pos >= len(text.rstrip()) - 1 else "is not JSON"
        raise ConfigError(
            f"{source!r} {what} (line {error.lineno}: {error.msg}); download the file again", source=source
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{source!r} holds a JSON {type(config).__name__}, not an object; a model's config.json is needed",
            source=source,
        )
    return cast("dict[str, object]", config)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, from the headers of its safetensors files.

    Raises:
        CheckpointError: there are no safetensors, a file is missing, cut off or corrupt, the index is broken or names
            a file outside the folder, or a tensor is not where the index says.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_index(index)
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(weight_map.values())):
            tensors |= read_header(folder / file)
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(
                    f"{INDEX} says that {name!r} is in {file!r}, which does not hold it; download the checkpoint again",
                    path=str(index),
                )
        return tensors
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    raise _no_safetensors(folder)


def _no_safetensors(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{str(folder)!r} holds only pickle files ({', '.join(pickles[:3])}), which can run code when they are "
            "opened; only safetensors are read. Where you trust the file, convert it once with: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f'M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + "-safetensors"!r})"',
            path=str(folder / pickles[0]),
        )
    return CheckpointError(
        f"no safetensors in {str(folder)!r}; {SINGLE} or {INDEX} with its shards is needed", path=str(folder)
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a safetensors index with a weight_map ({type(error).__name__}); "
            "download the file again",
            path=str(path),
        ) from error
    for file in pairs.values():
        # Names come from a downloaded file, so they may only be plain names inside the folder.
        if file != Path(file).name or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{str(path)!r} points outside its folder: {file!r}; every shard must be a plain file name",
                path=str(path),
            )
    return pairs


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, from its header.

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
        raise CheckpointError(
            f"shard {path.name!r} is missing from {str(path.parent)!r}; download the checkpoint again", path=str(path)
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}; check the file", path=str(path)) from error
    tensors, end = parse_header(header, path.name, source=path)
    if size != 8 + length + end:
        what = "cut off" if size < 8 + length + end else "too long"
        raise CheckpointError(
            f"shard {path.name!r} is {what}: {size} bytes on disk, {8 + length + end} in its header; "
            "download the file again",
            path=str(path),
        )
    return tensors


def parse_header(header: bytes, file: str, *, source: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors that a safetensors header lists, and where their data ends, in bytes after the header.

    Raises:
        CheckpointError: the header is not JSON, or a tensor's offsets do not match its dtype and shape.
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {}
        spans = []
        for name, entry in entries.items():
            shape = tuple(int(size) for size in entry["shape"])
            begin, end = entry["data_offsets"]
            bits = _DTYPE_BITS[entry["dtype"]]
            for size in shape:
                bits *= size
            if end - begin != (bits + 7) // 8 or min(shape, default=0) < 0:
                raise _corrupt(source, f"{name!r} of shape {list(shape)} takes {end - begin} bytes in it")
            tensors[name] = Tensor(entry["dtype"], shape, end - begin, file)
            spans.append((begin, end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(source, f"{type(error).__name__} in its header") from error
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _corrupt(source, f"its tensors overlap or leave a hole at byte {position}")
        position = end
    return tensors, position


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"shard {path.name!r} is corrupt: {why}; download the file again", path=str(path))
