"""Files beside the weights: tokenizer, chat template, generation settings, licence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_vram.checkpoints.files.names import CONFIG

REPORT = "merge_report.json"

_CARRIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "additional_chat_templates/*.jinja")
_LEFT = ("*.index.json", CONFIG, REPORT, "adapter_config.json", "trainer_state.json")


def companion_files(folder: Path) -> dict[str, Path]:
    """Return the files to copy to a new checkpoint, by their name there, without weights and config.json."""
    return matching(folder, _CARRIED, without=_LEFT)


def matching(folder: Path, patterns: Sequence[str], *, without: Sequence[str] = ()) -> dict[str, Path]:
    """Return the files in `folder` that match one of `patterns` and none of `without`, by their name in `folder`."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    kept = [path for path in paths if not any(path.match(pattern) for pattern in without)]
    return {str(path.relative_to(folder)): path for path in sorted(kept)}


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy `files` into `folder`."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
