"""Tell if two stretches of files hold the same bytes, read piece by piece up to the first difference."""

from __future__ import annotations

from pathlib import Path

from qwen_vram.errors import CheckpointError

# Two pieces of this size are in memory at a time.
_PIECE = 2**20


def same_bytes(one: Path, one_at: int, other: Path, other_at: int, nbytes: int) -> bool:
    """Tell if `nbytes` from byte `one_at` of `one` equal those from byte `other_at` of `other`.

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
