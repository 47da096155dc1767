"""Logs of a monitor: a file of JSON lines, of which each is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from qwen_vram.errors import QwenVramError
from qwen_vram.monitor.sample import Sample

One = TypeVar("One")


class LogError(QwenVramError):
    """A log cannot be written or read. `path` is the file."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class _Entry(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


class Log:
    """A file to which samples, or other entries, are appended.

    A line is one write, so that a killed process leaves whole lines. A last line without an end, from a full disk or a
    power failure, is cut off before the first new line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._cut()
        except OSError as error:
            raise LogError(
                f"cannot write the log {str(path)!r}: {error.strerror}; name a file in a folder that exists and can be "
                "written",
                path=str(path),
            ) from error

    def write(self, entry: _Entry) -> None:
        """Append an entry.

        Raises:
            LogError: the disk is full or fails; the log ends with its last whole line.
        """
        line = json.dumps(entry.to_dict(), separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            if written < len(line):
                self._cut()
                raise OSError(28, "no space left on device")
        except OSError as error:
            raise LogError(
                f"cannot write the log {str(self.path)!r}: {error.strerror}; free some space on its disk",
                path=str(self.path),
            ) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self) -> None:
        """Cut off a last line that has no end."""
        size = os.fstat(self._file).st_size
        end, step = size, 2**16
        while end:
            start = max(0, end - step)
            place = os.pread(self._file, end - start, start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
        if end != size:
            os.ftruncate(self._file, end)


def read_log(path: str | Path) -> list[Sample]:
    """Return the samples of a log, without a last line that is not whole.

    Raises:
        LogError: the file cannot be read, or a whole line is not a sample.
    """
    return read_lines(path, Sample.from_dict, "a sample of `qwen-vram monitor --log`")


def read_lines(path: str | Path, make: Callable[[Any], One], what: str) -> list[One]:
    """Return what `make` makes of each line of JSON in a file, without a last line that is not whole.

    Args:
        what: What a line is, and the command that wrote it, for the error.

    Raises:
        LogError: the file cannot be read, or `make` refuses a whole line.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise LogError(f"cannot read {str(path)!r}: {error.strerror}", path=str(path)) from error
    found = []
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            found.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LogError(
                f"line {number} of {str(path)!r} is not {what} ({type(error).__name__}: {error}); name a file that "
                "this command wrote",
                path=str(path),
            ) from error
    return found
