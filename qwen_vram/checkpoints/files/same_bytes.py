"""Comparison of two ranges of bytes in files, one piece after the other."""

from __future__ import annotations

from pathlib import Path

from qwen_vram.errors import CheckpointError

# Two pieces of this size are in memory at a time.
_PIECE = 2**20


def same_bytes(one: Path, one_at: int, other: Path, other_at: int, nbytes: int) -> bool:
    """Tell if `nbytes` bytes of `one`, from `one_at` on, equal those of `other`, from `other_at` on.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        with one.open("rb") as first, other.open("rb") as second:
            first.seek(one_at)
            second.seek(other_at)
            for start in range(0, nbytes, _PIECE):
                size = min(_PIECE, nbytes - start)
                if first.read(size) != second.read(size):
                    return False
    except OSError as error:
        raise CheckpointError(f"cannot read {str(one)!r} or {str(other)!r}: {error}", path=str(one)) from error
    return True
