"""The state of a folder's files, by which a later call tells that what was read of them still holds."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Name, device, inode, size, and times of the last change of contents and of the entry, for each entry of a folder.
State = tuple[tuple[str, int, int, int, int, int], ...]

# A file that changed less than this ago can change again without a new time. The coarsest clock of a file system is
# FAT's: 2 s. Source: Microsoft's FAT specification 1.03, "Date and Time Formats".
_CLOCK_NS = 2_000_000_000


def settled_state(folder: Path) -> State | None:
    """The state of every entry of `folder`, links followed; `None` if one changed just now or cannot be asked."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stat = entry.stat()
                times = (stat.st_mtime_ns, stat.st_ctime_ns)
                found.append((entry.name, stat.st_dev, stat.st_ino, stat.st_size, *times))
    except OSError:
        return None
    newest = max((max(entry[4:]) for entry in found), default=0)
    return tuple(sorted(found)) if newest + _CLOCK_NS < time.time_ns() else None
