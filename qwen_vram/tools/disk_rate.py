"""Rate at which a disk is read without the page cache, as disk layers are read."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from qwen_vram.checkpoints.machine_file import CalibrationError
from qwen_vram.runtime.tensors.file_extents import WeightsFile

# As large as the matrices of disk layers.
_CHUNK = 2**26
_REPEATS = 3


def disk_read_rate(folder: Path, size: int) -> int | None:
    """Return the bytes a second at which a file of `size` bytes in `folder` is read from its disk.

    Raises:
        CalibrationError: the folder's disk is too full, or fails.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    chunk = torch.empty(_CHUNK, dtype=torch.uint8).random_()  # random bytes, which no disk can compress
    view = chunk.numpy().data
    times = []
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="calibrate.") as file:
            for _ in range(0, size, _CHUNK):
                file.write(view)
            file.flush()
            os.fsync(file.fileno())
            weights = WeightsFile(Path(file.name))
            for _ in range(_REPEATS):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                start = time.perf_counter()
                for offset in range(0, size, _CHUNK):
                    weights.read_into(view, offset)
                times.append(time.perf_counter() - start)
    except OSError as error:
        raise CalibrationError(
            f"cannot write a file of {size:,} bytes in {str(folder)!r}: {error}; free some space, or set "
            "QWEN_VRAM_CACHE to a folder on another disk",
            what="disk",
        ) from error
    return int(size / statistics.median(times))
