"""Files from which a monitor reads the plans of running processes.

`load()` writes one file for each model, in the user's cache folder. The file is removed when the model is closed, when
it is dropped, or when the process ends. A process that is killed leaves its file. A reader removes such a file, because
the process of that number has another start time or does not exist.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from qwen_vram.checkpoints.machine_file import cache_file

_LOGGER = logging.getLogger(__name__)

FORMAT = 1
_NUMBERS = count()


class Publication:
    """The file of one model's plan, which `update` replaces and `remove` deletes.

    A folder that cannot be written is logged once and changes nothing else. A process that was forked leaves the file
    to its parent.
    """

    def __init__(self, owner: object, facts: Mapping[str, Any]) -> None:
        self._facts = {"format": FORMAT, "pid": os.getpid(), "started": started(os.getpid()), **facts}
        self._path = folder() / f"{os.getpid()}-{next(_NUMBERS)}.json"
        self._works = True
        self._write()
        self._finalizer = weakref.finalize(owner, _remove, self._path, os.getpid())

    def update(self, **facts: Any) -> None:
        """Replace facts, such as the measured memory of the last generation."""
        self._facts.update(facts)
        if self._works and os.getpid() == self._facts["pid"]:
            self._write()

    def remove(self) -> None:
        """Delete the file."""
        self._finalizer()

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = self._path.with_suffix(".part")
            temporary.write_text(json.dumps(self._facts), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            self._works = False
            _LOGGER.info("a monitor cannot see this model's plan: %s", error)


def folder() -> Path:
    """Return the folder of the files: `running/` in the cache folder."""
    return cache_file().parent / "running"


def read_all() -> list[dict[str, Any]]:
    """Return the facts of every model that is loaded now, in the order of their files; remove files of ended processes.

    A file that cannot be read is left out.
    """
    found = []
    try:
        paths = sorted(folder().glob("*.json"))
    except OSError:
        return []
    for path in paths:
        facts = _read(path)
        if facts is None:
            continue
        if started(facts["pid"]) == facts["started"]:
            found.append(facts)
        else:
            _remove(path, os.getpid())
    return found


def started(pid: int) -> float | None:
    """Return the start time of a process in seconds since 1970; `None` if there is no such process."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    known = isinstance(facts, dict) and facts.get("format") == FORMAT and type(facts.get("pid")) is int
    return facts if known else None


def _remove(path: Path, pid: int) -> None:
    if os.getpid() != pid:  # a fork
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _LOGGER.info("cannot remove %s: %s", path, error)
