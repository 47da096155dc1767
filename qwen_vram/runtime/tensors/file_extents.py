"""Byte ranges of a block in the checkpoint's files, and reading them.

The files are read, not mapped. A page fault blocks its thread for each page, cannot fill pinned memory, and ends the
process if the file has become shorter. A read runs at the disk's rate beside Python, and reports errors. Both use the
system's page cache.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import NamedTuple

from qwen_vram.errors import CheckpointError


class WeightsFile:
    """A file of the checkpoint, open until this object is freed; any thread may read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        end = offset + len(target)
        try:
            while target:
                count = os.preadv(self._descriptor, [target], offset)
                if not count:
                    raise CheckpointError(
                        f"{str(self.path)!r} ends at byte {offset:,}, and a disk layer is read from it up to byte "
                        f"{end:,}: it became shorter after it was loaded; restore the file, or download it again",
                        path=str(self.path),
                    )
                target, offset = target[count:], offset + count
        except OSError as error:
            raise CheckpointError(
                f"cannot read a disk layer from {str(self.path)!r}: {error}; check the disk", path=str(self.path)
            ) from error


class Extent(NamedTuple):
    """Contiguous bytes of a block in a file."""

    file: WeightsFile
    offset: int
    nbytes: int


class FileExtents:
    """The bytes of a block: the position of each piece in the checkpoint's files; small pieces are kept in memory.

    Args:
        parts: Each piece, or its bytes themselves, by its first byte in the block.
    """

    def __init__(self, parts: dict[int, Extent | bytes]) -> None:
        self._kept = [(start, part) for start, part in parts.items() if isinstance(part, bytes)]
        read = [(start, part) for start, part in parts.items() if isinstance(part, Extent)]
        # In the order of the files, because the system reads ahead.
        self._read = sorted(read, key=lambda item: (str(item[1].file.path), item[1].offset))

    def read_into(self, block: memoryview) -> None:
        """Read all pieces into `block`, which may be larger.

        Raises:
            CheckpointError: a file ends before, or cannot be read.
        """
        for start, part in self._kept:
            block[start : start + len(part)] = part
        for start, piece in self._read:
            piece.file.read_into(block[start : start + piece.nbytes], piece.offset)
