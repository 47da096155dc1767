"""Conversion of bytes to text and back; no other module uses 10**9 and 2**30 as units.

Inside the library a size is always an `int` of bytes. Text says GB (10**9) or GiB (2**30), never one for the other.
"""

from __future__ import annotations

import re

from qwen_vram.errors import UnitError

_BYTES_PER_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SIZE = r" *([0-9]+(?:\.[0-9]+)?) *([A-Za-z]+) *"  # compiled on first use, which most estimates do not need
_SPELLING = {unit.lower(): unit for unit in _BYTES_PER_UNIT}

# No GPU has less, so a smaller integer is a number of gigabytes without its unit.
SMALLEST_BUDGET = 2**20

_ALLOWED = 'write a size with its unit, such as "8GiB" or "8GB", or an int of bytes such as 8 * 2**30'


def parse_bytes(size: str | int, *, name: str = "size") -> int:
    """Return the bytes of `size`; refuse a bare number such as `8` or `"8"`, because its unit would be a guess.

    The result is exact: a fraction of a unit is rounded down to whole bytes.

    Args:
        size: `"8GiB"` (8 x 2**30), `"8GB"` (8 x 10**9), or an `int` of bytes of at least 1 MiB.
        name: The purpose of the size, for the error.

    Raises:
        UnitError: `size` has no unit, an unknown unit, or is not a size at all.

    Example:
        >>> parse_bytes("8GiB")
        8589934592
        >>> parse_bytes("8GB")
        8000000000
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < SMALLEST_BUDGET:
            raise UnitError(f"{name} is a bare number: got {size!r}; {_ALLOWED}", got=size)
        return size
    if isinstance(size, str):
        found = re.fullmatch(_SIZE, size)
        if found and found[2].lower() in _SPELLING:
            whole, _, fraction = found[1].partition(".")
            unit = _BYTES_PER_UNIT[_SPELLING[found[2].lower()]]
            scale: int = 10 ** len(fraction)
            return int(whole + fraction) * unit // scale
        if size.strip().replace(".", "", 1).isdigit():
            raise UnitError(f"{name} is a bare number: got {size!r}; {_ALLOWED}", got=size)
    raise UnitError(f"{name} is not a size: got {size!r}; {_ALLOWED}", got=size)


def format_gib(num_bytes: int) -> str:
    """Return `num_bytes` in GiB (2**30), two decimals.

    >>> format_gib(8 * 2**30)
    '8.00 GiB'
    """
    return f"{num_bytes / 2**30:.2f} GiB"


def format_gb(num_bytes: int) -> str:
    """Return `num_bytes` in GB (10**9), two decimals.

    >>> format_gb(15_231_233_024)
    '15.23 GB'
    """
    return f"{num_bytes / 10**9:.2f} GB"


def format_bytes(num_bytes: int) -> str:
    """Return `num_bytes` in the largest binary unit that leaves at least 1.

    >>> format_bytes(34_603_008)
    '33.0 MiB'
    >>> format_bytes(512)
    '512 B'
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(num_bytes) >= _BYTES_PER_UNIT[unit]:
            digits = 2 if unit in ("TiB", "GiB") else 1
            return f"{num_bytes / _BYTES_PER_UNIT[unit]:.{digits}f} {unit}"
    return f"{num_bytes} B"
