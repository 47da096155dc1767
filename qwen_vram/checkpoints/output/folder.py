"""The output folder, which one atomic rename puts in its place."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qwen_vram.checkpoints.files.names import CONFIG
from qwen_vram.checkpoints.output.interrupts import Interrupts
from qwen_vram.errors import CheckpointError
from qwen_vram.units import format_bytes

# Source: linux/fs.h and linux/fcntl.h.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class OutputFolder:
    """A folder that appears at `out` by one atomic rename in `publish()`.

    Until then the files are in a folder beside it, which the next run removes if this run is killed. A lock file keeps
    two runs from writing the same output. POSIX only.

    Args:
        out: The final path. A checkpoint there stays until the rename, and is refused without `overwrite`.
        needed_bytes: Bytes that must be free on the disk.
        sources: Folders that are read, which `out` must not be or contain.

    Raises:
        CheckpointError: `out` exists, is not a folder, or contains a source; another run is writing it; the disk is too
            full or fails.
    """

    def __init__(self, out: Path, *, needed_bytes: int, sources: Sequence[Path], overwrite: bool) -> None:
        self.out = out.absolute()
        self.overwrite = overwrite
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self._lock_path = self.out.parent / f".{self.out.name}.partial.lock"
        self._check_place(sources)
        self._check_room(needed_bytes)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"output {str(self.out)!r} {what}", path=str(self.out))

    def _check_place(self, sources: Sequence[Path]) -> None:
        if not self.out.name or self.out.name in (".", ".."):
            raise self._error("is not a folder's name; pass a new folder such as 'model-nf4'")
        for source in sources:
            if source.resolve().is_relative_to(self.out.resolve()):
                raise self._error(f"is, or holds, {str(source)!r}, which is read; choose another folder")
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise self._error("is a file or a link; choose another folder")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not self.overwrite:
            raise self._error("exists; choose another folder, or pass overwrite=True (--overwrite)")
        if not (self.out / CONFIG).is_file():
            raise self._error(f"has no {CONFIG}, so it is not a checkpoint and is not overwritten; remove it yourself")

    def _check_room(self, needed_bytes: int) -> None:
        existing = next(folder for folder in self.out.parents if folder.exists())
        free = shutil.disk_usage(existing).free
        if free < needed_bytes:
            raise self._error(
                f"takes {format_bytes(needed_bytes)}, and {format_bytes(free)} are free on its disk; free some space, "
                "choose another disk, or quantize to fewer bits"
            )

    def __enter__(self) -> OutputFolder:
        self._interrupts = Interrupts()
        try:
            self._begin()
        except BaseException:
            self._interrupts.restore(raising=True)
            raise
        return self

    def _begin(self) -> None:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise self._error(f"cannot be made: {error}; choose another folder") from error
        try:
            self._remove(self.folder)
            self._check_exchange()
            self.folder.mkdir()
            self._interrupts.allow()
        except BaseException:
            self._clear()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.hold()
        try:
            self._clear()
        finally:
            self._interrupts.restore(raising=error is not None)
        if isinstance(error, OSError):
            raise self._error(f"could not be written ({error}), and nothing of it is left; check the disk") from error

    def publish(self) -> None:
        """Move the folder to its final path, after its files are written to the disk.

        Raises:
            CheckpointError: another file or folder appeared there in the meantime.
        """
        for folder, _, files in os.walk(self.folder, topdown=False):
            for path in (*(Path(folder, name) for name in files), Path(folder)):
                _sync(path)
        # Ctrl-C waits from the rename until the replaced folder is removed, so that nothing is left beside the output.
        self._interrupts.hold()
        if self.overwrite and self.out.exists():
            _exchange(self.folder, self.out)
        else:
            try:
                os.rename(self.folder, self.out)
            except OSError as error:
                raise self._error(
                    f"appeared while it was being made ({error.strerror}); choose another folder"
                ) from error
        _sync(self.out.parent)

    def _locked(self) -> int:
        import fcntl

        while True:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise self._error("is being written by another run; wait for it, or choose another folder") from None
            # The run that held the lock before removes the file, possibly after it was opened here.
            if self._lock_path.exists() and os.path.samestat(os.fstat(descriptor), self._lock_path.stat()):
                return descriptor
            os.close(descriptor)

    def _clear(self) -> None:
        """Remove the folder beside the final path: an unpublished output, or the one that was replaced."""
        self._remove(self.folder)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    def _check_exchange(self) -> None:
        """Refuse at the start, not after hours, a disk that cannot swap two folders."""
        if not self.overwrite or not self.out.exists():
            return
        one, other = self.folder / "one", self.folder / "other"
        one.mkdir(parents=True)
        other.mkdir()
        try:
            _exchange(one, other)
        except OSError as error:
            raise self._error(
                f"cannot be replaced at once on this disk ({error.strerror}); remove it, or choose another folder"
            ) from error
        finally:
            self._remove(self.folder)

    def _remove(self, folder: Path) -> None:
        if folder.exists():
            shutil.rmtree(folder)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step.

    Raises:
        OSError: the system or the disk cannot swap them.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(0, "no renameat2 here")
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _sync(path: Path) -> None:
    """Write a file's contents, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
