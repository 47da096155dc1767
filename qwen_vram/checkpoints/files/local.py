"""A checkpoint folder: its config.json, its set of weights, and their headers.

The meaning of names and shapes is in `spec.architecture`, and not used here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from qwen_vram.checkpoints.files.json_text import MARK, parse_json
from qwen_vram.checkpoints.files.names import (
    AUTO_AWQ_CONFIG,
    AUTO_GPTQ_CONFIG,
    AUTO_GPTQ_SINGLE,
    CONFIG,
    GENERATION,
    INDEX,
    NAMED_WEIGHTS,
    SINGLE,
)
from qwen_vram.checkpoints.files.safetensors_header import Tensor, read_header
from qwen_vram.errors import CheckpointError, ConfigError

_AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}


def exists(path: Path) -> bool:
    """Tell if a file or folder exists; false for a name that is too long for the file system."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Tell if a folder exists; false for a name that is too long for the file system."""
    try:
        return path.is_dir()
    except OSError:
        return False


def read_config(folder: Path) -> dict[str, object]:
    """Return the config.json of `folder`, with AutoGPTQ's or AutoAWQ's settings if those are in a file of their own.

    Raises:
        ConfigError: a file is missing, is not UTF-8, is cut off, or is not a JSON object.
    """
    path = folder / CONFIG
    if not path.exists():
        from qwen_vram.checkpoints.files.absent import no_config  # only for an error

        raise no_config(folder)
    config = read_json(path)
    for name, add in ((AUTO_GPTQ_CONFIG, with_auto_gptq), (AUTO_AWQ_CONFIG, with_auto_awq)):
        if (folder / name).is_file():
            config = add(config, read_json(folder / name))
    return config


def read_generation(folder: Path) -> dict[str, object]:
    """Return the generation_config.json of `folder`; empty if it does not exist.

    `transformers` silently ignores a file that it cannot read, and with it the tokens that end an answer.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    path = folder / GENERATION
    if not path.is_file():
        return {}
    return read_json(path, marked=False)


def with_auto_gptq(config: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """Return `config` with AutoGPTQ's `settings` as its `quantization_config`, unless it has one."""
    return {"quantization_config": {"quant_method": "gptq", **settings}, **config}


def with_auto_awq(config: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """Return `config` with the `settings` of an older AutoAWQ as its `quantization_config`, unless it has one."""
    named = {_AWQ_KEYS.get(key, key): value for key, value in settings.items()}
    return {"quantization_config": {"quant_method": "awq", **named}, **config}


def read_json(path: Path, *, marked: bool = True) -> dict[str, object]:
    """Return the JSON object in a file.

    Args:
        marked: The text may begin with a byte-order mark, which `transformers` does not read.

    Raises:
        ConfigError: the file cannot be read, or holds no JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}; check the file", source=str(path)) from error
    if not marked and data.startswith(MARK):
        raise ConfigError(
            f"{str(path)!r} begins with a byte-order mark, which transformers does not read; save it as UTF-8 without "
            "one",
            source=str(path),
        )
    return parse_config(data, source=str(path))


def parse_config(text: str | bytes, *, source: str) -> dict[str, object]:
    """Return the JSON object in `text`.

    Raises:
        ConfigError: `text` is not JSON, is cut off, or is not an object.
    """
    data = text.encode() if isinstance(text, str) else text
    config = parse_json(data, source, lambda message: ConfigError(message, source=source))
    if not isinstance(config, dict):
        raise ConfigError(
            f"{source!r} holds a JSON {type(config).__name__}, not an object; a model's config.json is needed",
            source=source,
        )
    return cast("dict[str, object]", config)


def read_tensors(folder: Path, config: Mapping[str, object] | None = None) -> dict[str, Tensor]:
    """Return every tensor of the checkpoint in `folder`, from the headers of its safetensors files, by its name there.

    Raises:
        CheckpointError: there are no safetensors, or a file is missing, cut off or corrupt. Also an index that is
            broken, names a file outside the folder, or names a wrong file for a tensor.
    """
    weights = weights_file(folder, config)
    if weights.name.endswith(".json"):
        return indexed_tensors(weights, lambda file: read_header(folder / file))
    return read_header(weights)


def weights_file(folder: Path, config: Mapping[str, object] | None = None) -> Path:
    """Return the file of weights of the checkpoint in `folder`, or the index of its shards, as `transformers` chooses.

    A single file is preferred to an index, because `transformers` reads the single file if a folder has both.

    Raises:
        CheckpointError: both are missing.
    """
    named = (config or {}).get(NAMED_WEIGHTS)
    if isinstance(named, str):
        return folder / _plain_name(named, folder / CONFIG)
    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            return folder / name
    for pattern in (f"{AUTO_GPTQ_SINGLE}.index.json", AUTO_GPTQ_SINGLE):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    from qwen_vram.checkpoints.files.absent import no_weights  # only for an error

    raise no_weights(folder, SINGLE, INDEX)


def has_weights(folder: Path, config: Mapping[str, object] | None = None) -> bool:
    """Tell if `folder` has a file or an index of weights."""
    try:
        return weights_file(folder, config).exists()
    except CheckpointError:
        return False


def indexed_tensors(index: Path, read: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return every tensor of the shards that `index` names; `read` returns the tensors of one shard.

    Raises:
        CheckpointError: the index is broken, names a file outside its folder, or names a wrong file for a tensor.
    """
    weight_map = read_index(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        tensors |= read(file)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{index.name} says that {name!r} is in {file!r}, which does not hold it: the index and the shards are "
                f"of different savings; get {index.name} and {file!r} from the same repository again",
                path=str(index),
            )
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names.

    Raises:
        CheckpointError: the file is not an index, or names a file outside its folder.
    """

    def refused(message: str) -> CheckpointError:
        return CheckpointError(message, path=str(path))

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        from qwen_vram.checkpoints.files.absent import no_weights  # only for an error

        raise no_weights(path.parent, SINGLE, INDEX) from None
    except OSError as error:
        raise refused(f"cannot read {str(path)!r}: {error}; check the file") from error
    if data.startswith(MARK):
        raise refused(
            f"{str(path)!r} begins with a byte-order mark, which transformers does not read; save it as UTF-8 without "
            "one"
        )
    named = f"{str(path)!r} is not a safetensors index with a weight_map"
    content = parse_json(data, str(path), lambda why: refused(f"{named}: it {why.removeprefix(repr(str(path)) + ' ')}"))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(weight_map, dict):
        raise refused(f"{named}; take {path.name} of the repository that the shards are of")
    if path.name == INDEX and not isinstance(content.get("metadata"), dict):
        raise refused(
            f"{str(path)!r} has no object 'metadata', which transformers asks for; write \"metadata\": {{}} beside "
            '"weight_map"'
        )
    plain = {file: _plain_name(file, path) for file in set(map(str, weight_map.values()))}
    return {str(name): plain[str(file)] for name, file in weight_map.items()}


def _plain_name(file: str, source: Path) -> str:
    """Return `file` itself, if it is a plain name inside the folder, because the name is from a downloaded file.

    Raises:
        CheckpointError: it is not a plain name.
    """
    if file != Path(file).name or "\\" in file or file in ("", ".", ".."):
        raise CheckpointError(
            f"{str(source)!r} points outside its folder: {file!r}; every shard must be a plain file name",
            path=str(source),
        )
    return file
