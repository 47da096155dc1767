"""Images: where the bytes of a block lie in the checkpoint's files, and reading them.

They are read, not mapped: a page fault stops whatever touches the memory, a page at a time, cannot fill pinned memory,
and where a file has become shorter it ends the process. A read runs at the disk's rate beside Python, and says what is
wrong. What the system's page cache still holds comes from there either way.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import NamedTuple

from qwen_vram.errors import CheckpointError


class WeightsFile:
    """A file of the checkpoint, open as long as this object lives; any thread may read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, room: memoryview, offset: int) -> None:
        """Fill `room` with the bytes from `offset` on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        end = offset + len(room)
        try:
            while room:
                count = os.preadv(self._descriptor, [room], offset)
                if not count:
                    raise CheckpointError(
                        f"{str(self.path)!r} ends at byte {offset:,}, and a disk layer is read from it up to byte "
                        f"{end:,}: it became shorter after it was loaded; restore the file, or download it again",
                        path=str(self.path),
                    )
                room, offset = room[count:], offset + count
        except OSError as error:
            raise CheckpointError(
                f"cannot read a disk layer from {str(self.path)!r}: {error}; check the disk", path=str(self.path)
            ) from error


class Extent(NamedTuple):
    """Bytes of a block that lie side by side in a file."""

    file: WeightsFile
    offset: int
    nbytes: int


class FileExtents:
    """A block's bytes: where each piece of them lies in the checkpoint's files; small ones are kept.

    Args:
        parts: Each piece, or its bytes themselves, by where it begins in the block.
    """

    def __init__(self, parts: dict[int, Extent | bytes]) -> None:
        self._kept = [(start, part) for start, part in parts.items() if isinstance(part, bytes)]
        read = [(start, part) for start, part in parts.items() if isinstance(part, Extent)]
        # In the order of the files, for the system reads ahead.
        self._read = sorted(read, key=lambda item: (str(item[1].file.path), item[1].offset))

    def read_into(self, block: memoryview) -> None:
        """Put all of it into `block`, or more room.

        Raises:
            CheckpointError: a file ends before, or cannot be read.
        """
        for start, part in self._kept:
            block[start : start + len(part)] = part
        for start, piece in self._read:
            piece.file.read_into(block[start : start + piece.nbytes], piece.offset)
