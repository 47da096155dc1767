"""Results in a file: a line of JSON for each row, which is whole or absent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qwen_vram.benchmark.row import BenchmarkRow
from qwen_vram.monitor.log import read_lines


def read_benchmark(path: str | Path) -> list[BenchmarkRow]:
    """Return the rows of a file, the newest of each key, without a last line that is not whole.

    Raises:
        LogError: the file cannot be read, or a whole line is not a row.
    """
    return newest(read_lines(path, BenchmarkRow.from_dict, "a row of `qwen-vram bench --out`"))


def newest(rows: Iterable[BenchmarkRow]) -> list[BenchmarkRow]:
    """Return the last row of each key, in the order in which the keys appeared."""
    return list({row.key: row for row in rows}.values())
