"""The file of measured machines in the user's cache folder.

`current()` gives the machine that the estimator uses.

The module uses the standard library only and never asks the driver, because an estimate must not need a GPU. The
machine that was measured last is therefore the current one, and an estimate holds the one it used (`Estimate.machine`).
"""

from __future__ import annotations

import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

from qwen_vram.errors import QwenVramError
from qwen_vram.spec.machine import DEFAULT, Machine, parse_machine

_FORMAT = 1
_ADVICE = "`qwen-vram calibrate` writes it anew, `qwen-vram calibrate --reset` deletes it"


class CalibrationError(QwenVramError):
    """A machine cannot be measured, stored, or read back. `what` is the step or the file at fault."""

    def __init__(self, message: str, *, what: str) -> None:
        super().__init__(message)
        self.what = what


class Stored(NamedTuple):
    """Contents of the file: every machine by its key, and the key of the machine that was measured last."""

    current: str
    machines: dict[str, Machine]


def cache_file() -> Path:
    """Return the path of the file of machines: in `QWEN_VRAM_CACHE`, or in the user's cache folder as the hub's cache.

    The default is `qwen_vram/` in `XDG_CACHE_HOME`, which is `~/.cache` if it is not set.
    """
    folder = os.environ.get("QWEN_VRAM_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "qwen_vram")
    return Path(os.path.expanduser(folder)) / "machines.json"


def read() -> Stored | None:
    """Return the stored machines; `None` if there is no file.

    Raises:
        CalibrationError: the file cannot be read, or was not written by `store`.
    """
    path = cache_file()
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r} is not {_FORMAT}")
        stored = Stored(data["current"], {key: parse_machine(entry) for key, entry in data["machines"].items()})
        if stored.current not in stored.machines:
            raise ValueError(f"it holds no machine {stored.current!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CalibrationError(
            f"cannot use the stored machines in {str(path)!r} ({type(error).__name__}: {error}); {_ADVICE}",
            what=str(path),
        ) from error
    return stored


@cache
def current() -> Machine:
    """Return the machine that was measured last, or the stated defaults; the file is read once in a process.

    A file that cannot be used leads to a warning and the defaults, so no estimate fails because of it.
    """
    try:
        stored = read()
    except CalibrationError as error:
        warnings.warn(f"{error}; until then the defaults are used", stacklevel=2)
        return DEFAULT
    return DEFAULT if stored is None else stored.machines[stored.current]


def store(machine: Machine) -> Path:
    """Store a measured machine as the current one, beside the others; replace a file that cannot be used.

    Raises:
        CalibrationError: the file cannot be written.
    """
    try:
        known = read()
    except CalibrationError:
        known = None
    machines = {**(known.machines if known else {}), machine.key: machine}
    entries = {key: entry._asdict() for key, entry in machines.items()}
    path = make_folder()
    _replace(path, json.dumps({"format": _FORMAT, "current": machine.key, "machines": entries}, indent=2) + "\n")
    current.cache_clear()
    return path


def make_folder() -> Path:
    """Return the file's path, and make its folder if it is missing.

    Raises:
        CalibrationError: the folder cannot be made or written.
    """
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, "no permission")
    return path


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically: an interrupt leaves the earlier text or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def reset() -> bool:
    """Delete the file, and tell if it existed.

    Raises:
        CalibrationError: it cannot be deleted.
    """
    path = cache_file()
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CalibrationError(f"cannot delete {str(path)!r}: {error}; delete it by hand", what=str(path)) from error
    finally:
        current.cache_clear()
    return True


def _unwritable(path: Path, error: object) -> CalibrationError:
    return CalibrationError(
        f"cannot write {str(path)!r}: {error}; set QWEN_VRAM_CACHE to a folder that can be written", what=str(path)
    )
