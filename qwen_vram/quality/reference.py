"""Logits of the reference on the disk: computed once, and read document by document."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_vram.checkpoints.machine_file import cache_file
from qwen_vram.errors import CheckpointError
from qwen_vram.units import format_bytes

_FACTS = "reference.json"
_PARTIAL = ".partial-"
# Bytes of a logit: it is stored in the dtype that the model computes, which has at most 32 bits.
_MOST_BYTES = 4


class ReferenceLogits:
    """A folder with the logits of each document, which appears by one rename when it is complete.

    Args:
        root: The folder of all references; `None` is the user's cache folder.
        facts: The model, the documents, and all that changes the logits. Their hash is the folder's name.
    """

    def __init__(self, root: Path | None, facts: dict[str, Any]) -> None:
        self.root = root or cache_file().parent / "reference-logits"
        self.facts = facts
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = self.root / digest[:24]

    @property
    def is_stored(self) -> bool:
        """Tell if the logits are on the disk."""
        return (self.folder / _FACTS).is_file()

    def read(self, number: int) -> Tensor:
        """Return the logits of a document.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / f"{number:04}.safetensors"
        try:
            return load_file(path)["logits"]
        except Exception as error:  # safetensors raises several
            raise CheckpointError(
                f"the stored logits {str(path)!r} cannot be read ({error}); delete their folder and repeat the call",
                path=str(path),
            ) from error

    def check_disk(self, logits: int) -> None:
        """Refuse a disk that is too full for this number of logits, before a model is loaded.

        Raises:
            CheckpointError: the disk has less free memory, or the folder cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder of the reference's logits {str(self.root)!r} cannot be made ({error.strerror}); name "
                "another one with logits= (--logits)",
                path=str(self.root),
            ) from error
        _remove_leftovers(self.root)
        needed, free = logits * _MOST_BYTES, shutil.disk_usage(self.root).free
        if needed > free:
            raise CheckpointError(
                f"the reference's logits take up to {format_bytes(needed)} in {str(self.root)!r}, and "
                f"{format_bytes(free)} are free; use fewer texts (--texts), or name another folder with logits= "
                "(--logits)",
                path=str(self.root),
            )

    def write(self, logits: Iterator[Tensor], done: Callable[[], object]) -> None:
        """Store the logits of each document. If this is stopped, nothing is left.

        Args:
            done: Called after each document.
        """
        partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{os.getpid()}-", dir=self.root))
        try:
            for number, one in enumerate(logits):
                save_file({"logits": one.contiguous()}, partial / f"{number:04}.safetensors")
                done()
            (partial / _FACTS).write_text(json.dumps(self.facts, indent=1), encoding="utf-8")
            if not self.is_stored:  # another process may have stored the same meanwhile
                partial.rename(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def identity(folder: Path) -> list[list[Any]]:
    """Return names, sizes and times of the files that determine a checkpoint's logits; nothing for a hub id."""
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".bin")]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _remove_leftovers(root: Path) -> None:
    """Remove partial folders of processes that were killed."""
    for path in root.glob(f"{_PARTIAL}*"):
        pid = path.name.removeprefix(_PARTIAL).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
