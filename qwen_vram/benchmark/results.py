"""Results in a file: a line of JSON for each row, which is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qwen_vram.benchmark.row import BenchmarkRow
from qwen_vram.monitor.log import LogError


def read_benchmark(path: str | Path) -> list[BenchmarkRow]:
    """Return the rows of a file, the newest of each key, without a last line that is not whole.

    Raises:
        LogError: the file cannot be read, or a whole line is not a row.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise LogError(f"cannot read the results {str(path)!r}: {error.strerror}", path=str(path)) from error
    rows = []
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            rows.append(BenchmarkRow.from_dict(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LogError(
                f"line {number} of {str(path)!r} is not a row of `qwen-vram bench --out` ({type(error).__name__}: "
                f"{error}); name a file that this command wrote, or a new one",
                path=str(path),
            ) from error
    return newest(rows)


def newest(rows: Iterable[BenchmarkRow]) -> list[BenchmarkRow]:
    """Return the last row of each key, in the order in which the keys appeared."""
    return list({row.key: row for row in rows}.values())
