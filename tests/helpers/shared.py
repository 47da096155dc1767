"""Folders that one test session makes once, however many processes of pytest-xdist run it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this session, filled by `make` in the first process that asks; the others wait for it.

    Tests must not change what is in it. If `make` fails, the next process tries again.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the session's; each worker has a folder of its own in it
    place = root / "shared" / name  # with nothing beside the folder, as a test asks
    place.mkdir(parents=True, exist_ok=True)
    folder, part = place / "made", place / "part"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder)
    return folder
