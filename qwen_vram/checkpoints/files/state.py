"""State of a folder's files, which shows if earlier results of reading are still valid."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Name, device, inode, size, and times of the last change of contents and of the entry, for each entry of a folder.
State = tuple[tuple[str, int, int, int, int, int], ...]

# A file that changed within this time can change again without a new time stamp. FAT has the coarsest clock of a file
# system: 2 s. Source: Microsoft's FAT specification 1.03, "Date and Time Formats".
_CLOCK_NS = 2_000_000_000


def settled_state(folder: Path) -> State | None:
    """Return the state of every entry of `folder`, links followed; `None` if one changed just now or gives no state."""
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
