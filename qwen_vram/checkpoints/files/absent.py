"""Errors for missing config.json or weights, by the files that are there instead."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qwen_vram.checkpoints.files.contents import GGUF, beginning_of, mistaken
from qwen_vram.checkpoints.files.names import ADAPTER_CONFIG
from qwen_vram.errors import CheckpointError, ConfigError

# Endings of files that browsers, hf download, aria2, wget and ModelScope have not finished downloading.
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".tmp", ".aria2__temp", "._____temp")
# Folder of unfinished files of hf download --local-dir. Source: huggingface_hub 1.x, _local_folder.py.
_LOCAL_DIR_CACHE = Path(".cache", "huggingface", "download")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN = 3


def shown(names: Iterable[str]) -> str:
    """Return the first of some names, with the number of the others.

    >>> shown(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"{', '.join(every[:_SHOWN])}{more}"


def unfinished(folder: Path, name: str = "") -> str:
    """Return a file that a stopped download of `name`, or of any safetensors, left in `folder`; empty without one."""
    places = [folder, folder / _LOCAL_DIR_CACHE, folder / "._____temp"]
    for path in (path for place in places for path in _files(place)):
        stem = next((path.name.removesuffix(end) for end in _UNFINISHED if path.name.endswith(end)), "")
        in_cache = path.parent != folder and (path.name.endswith(".incomplete") or path.parent.name == "._____temp")
        if in_cache or (stem and (stem == name or (not name and ".safetensors" in stem))):
            return str(path.relative_to(folder))
    return ""


def no_config(folder: Path) -> ConfigError:
    """Return the error for a folder without config.json, by the files in it."""
    source = str(folder / "config.json")
    files = [path.name for path in _files(folder)]
    folders = sorted(path.name for path in _entries(folder) if path.is_dir())
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    inner = [name for name in folders if (folder / name / "config.json").is_file()]
    if ggufs and not any(name.endswith(".safetensors") for name in files):
        return ConfigError(f"{str(folder)!r} holds no transformers checkpoint: {ggufs[0]!r} {GGUF}", source=source)
    if ADAPTER_CONFIG in files:
        base = _base_of(folder / ADAPTER_CONFIG)
        return ConfigError(
            f"{str(folder)!r} is a LoRA adapter, not a model: it has {ADAPTER_CONFIG} and no config.json; pass its "
            f"base {base}as the model, and this folder as adapter={str(folder)!r}",
            source=source,
        )
    if "snapshots" in folders:
        snapshots = sorted(path.name for path in _entries(folder / "snapshots") if (path / "config.json").is_file())
        if snapshots:
            return ConfigError(
                f"{str(folder)!r} is the hub cache's folder of a repository; pass the snapshot in it: "
                f"{str(folder / 'snapshots' / snapshots[-1])!r}",
                source=source,
            )
    if inner:
        return ConfigError(
            f"no config.json in {str(folder)!r} itself; the checkpoints are in its folders {shown(inner)}: pass one of "
            f"them, such as {str(folder / inner[-1])!r}",
            source=source,
        )
    if not files and not folders:
        return ConfigError(
            f"no config.json in {str(folder)!r}; point to the folder that holds config.json and *.safetensors, for "
            f"this one is empty, or download the checkpoint into it: hf download NAME --local-dir {str(folder)!r}",
            source=source,
        )
    beside = unfinished(folder)
    if beside:
        return ConfigError(
            f"no config.json in {str(folder)!r}: a download stopped there ({beside!r} is left of it); run the same "
            "download again, and it resumes",
            source=source,
        )
    if any(name.endswith((".safetensors", *_PICKLES)) for name in files):
        return ConfigError(
            f"no config.json in {str(folder)!r}, which has weights; put the config.json of the same repository beside "
            "them",
            source=source,
        )
    return ConfigError(
        f"no config.json in {str(folder)!r}; point to the folder that holds config.json and *.safetensors",
        source=source,
    )


def no_weights(folder: Path, single: str, index: str) -> CheckpointError:
    """Return the error for a folder with config.json but without a file or index of weights, by the files in it."""
    files = sorted(path.name for path in _files(folder))
    pickles = [name for name in files if name.endswith(_PICKLES)]
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    shards = [name for name in files if name.endswith(".safetensors") and "-of-" in name]
    others = [name for name in files if name.endswith(".safetensors") and not name.startswith("adapter_model")]
    beside = unfinished(folder)
    if beside:
        what = f"no safetensors in {str(folder)!r}: a download stopped there ({beside!r} is left of it); run the same "
        return CheckpointError(f"{what}download again, and it resumes", path=str(folder / beside))
    if shards:
        return CheckpointError(
            f"{str(folder)!r} holds shards ({shown(shards)}) without {index!r}, which says what is in which; download "
            "that file of the same repository too",
            path=str(folder / index),
        )
    if others:
        return CheckpointError(
            f"no safetensors in {str(folder)!r} by the names that transformers reads ({single}, or {index} with its "
            f"shards): {shown(others)} is there; if that is the whole model, rename it to {single}",
            path=str(folder / others[0]),
        )
    if ggufs:
        return CheckpointError(f"no safetensors in {str(folder)!r}: {ggufs[0]!r} {GGUF}", path=str(folder / ggufs[0]))
    if pickles:
        found = mistaken(beginning_of(folder / pickles[0]))
        if found and "pickle" not in found:
            return CheckpointError(f"{pickles[0]!r} in {str(folder)!r} {found}", path=str(folder / pickles[0]))
        return CheckpointError(
            f"{str(folder)!r} holds only pickle files ({shown(pickles)}), which can run code when they are "
            "opened; only safetensors are read. If you trust the file, convert it once with: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({str(folder) + '-safetensors'!r})\", "
            "and copy the tokenizer's files beside it",
            path=str(folder / pickles[0]),
        )
    return CheckpointError(
        f"no safetensors in {str(folder)!r}; {single} or {index} with its shards is needed: download the weights of "
        "the same repository into it",
        path=str(folder),
    )


def missing_shard(path: Path) -> CheckpointError:
    """Return the error for a file of weights that the index names and the folder lacks."""
    beside = unfinished(path.parent, path.name)
    left = f": its download stopped ({beside!r} is left of it)" if beside else ""
    return CheckpointError(
        f"shard {path.name!r} is missing from {str(path.parent)!r}{left}; download that file, or run the download of "
        "the checkpoint again, and it resumes",
        path=str(path),
    )


def _base_of(settings: Path) -> str:
    try:
        base = json.loads(settings.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f"{base!r} " if isinstance(base, str) and base else ""


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_file()]
