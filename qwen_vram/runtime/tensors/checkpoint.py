"""The checked checkpoint that a model is loaded from, with config and tokenizer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vram.checkpoints.checkpoint import CheckpointFiles
from qwen_vram.checkpoints.files.contents import beginning_of, mistaken
from qwen_vram.checkpoints.files.local import read_json
from qwen_vram.checkpoints.files.place import Place
from qwen_vram.checkpoints.hub.files import hub_snapshot
from qwen_vram.checkpoints.resolve import ModelLike, Resolved, open_folder, resolve
from qwen_vram.dtypes import BY_NAME, FP32
from qwen_vram.errors import CheckpointError, ConfigError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.units import format_bytes

_LOGGER = logging.getLogger(__name__)

_TOKENIZER_JSON = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
_TOKENIZER = (*_TOKENIZER_JSON, "merges.txt", "tokenizer.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint: its name, and the contents of its folder."""

    name: str
    files: CheckpointFiles

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.files.folder

    @property
    def architecture(self) -> Architecture:
        """The architecture of the model."""
        return self.files.architecture


def open_checkpoint(model: ModelLike, found: Resolved | None = None) -> Checkpoint:
    """Return the checked files of `model`: a folder, a catalog name or a hub id, downloaded if needed.

    Args:
        found: The result of `resolve(model)`, so that its folder is not read again.

    Raises:
        ConfigError: `model` has no files (a dict, an `Architecture`), or its config.json cannot be used.
        CheckpointError: safetensors are missing, cut off, corrupt, or have other names or shapes than in config.json.
        HubError: the hub does not give the files.
    """
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"load() needs weights: a checkpoint folder, a catalog name or a hub id, got a {type(model).__name__}"
        )
    found = found or resolve(model, False)
    files = found.files
    if files is None or not files.tensors:
        folder = hub_snapshot(found.repo_id) if files is None else files.folder
        files = open_folder(Place(folder, ""), weights=True).files
    assert files is not None
    return Checkpoint(name=found.label, files=files)


def model_config(config: Mapping[str, object], source: str, folder: Path | None = None) -> Any:
    """Return `transformers`' config object for the contents of a config.json.

    Args:
        folder: The folder of the file, if it is local.

    Raises:
        ConfigError: `transformers` refuses the contents.
    """
    from transformers import CONFIG_MAPPING

    try:
        made = CONFIG_MAPPING[str(config["model_type"])].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # its validators raise many kinds of errors
        lines = " ".join(str(error).split())
        raise ConfigError(f"{source}: transformers refuses it ({lines}); correct that key", source=source) from error
    if folder is not None:
        made.name_or_path = str(folder)
    return made


def warn_of_files(files: CheckpointFiles, profile: Profile) -> None:
    """Log one line for each note on the files: tensors without a module, and files in float32 for 16 bits."""
    for note in files.notes:
        _LOGGER.warning("%s: %s", files.folder, note)
    total = sum(tensor.nbytes for tensor in files.tensors.values())
    wide = sum(tensor.nbytes for tensor in files.tensors.values() if tensor.dtype == FP32.stored)
    if files.architecture.stored_format is None and profile.dtype != FP32.name and 2 * wide > total:
        _LOGGER.warning(
            "%s: the weights are stored in float32 (%s) and run in %s, so that the files are twice as large as they "
            "need to be; save them once in %s and every load reads half",
            files.folder,
            format_bytes(total),
            profile.dtype,
            BY_NAME[profile.dtype].torch,
        )


def open_tokenizer(folder: Path, config: Any = None) -> Any:
    """Return the tokenizer of a checkpoint; without tokenizer files it has no vocabulary.

    Args:
        config: The model's config, if it exists already.

    Raises:
        CheckpointError: its files are broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise _broken_tokenizer(folder, error) from error


def _broken_tokenizer(folder: Path, error: Exception) -> CheckpointError:
    """Return the error for a tokenizer that cannot be opened: for its first broken file, or the library's error."""
    broken = f"the tokenizer in {str(folder)!r} cannot be read"
    for name in _TOKENIZER:
        path = folder / name
        if not path.is_file():
            continue
        found = mistaken(beginning_of(path))
        if found:
            return CheckpointError(f"{broken}: {name!r} in it {found}", path=str(path))
        if name in _TOKENIZER_JSON:
            try:
                read_json(path, marked=False)
            except ConfigError as refused:
                return CheckpointError(f"{broken}: {refused}", path=str(path))
    return CheckpointError(
        f"{broken} ({type(error).__name__}: {error}); download tokenizer.json and tokenizer_config.json again",
        path=str(folder),
    )
