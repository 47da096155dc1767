"""Tables: as cells for the terminal, and as Markdown with the article's figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from qwen_vram.benchmark.configurations import CLAIMED_WORKLOAD, CLAIMS
from qwen_vram.benchmark.row import BenchmarkRow, Figure

_UNITS = ((2**30, "GiB", 2), (2**20, "MiB", 1))
_NOTHING = "-"


class Cell(NamedTuple):
    """A cell: the measured figure as text, and the predicted one if there can be one."""

    measured: str
    predicted: str | None = None


class Table(NamedTuple):
    """A table: its title, the names of its columns, and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def tables(rows: Sequence[BenchmarkRow]) -> list[Table]:
    """Return a table for each model, device and workload."""
    return [_table(list(group)) for _, group in groupby(rows, key=_subject)]


def markdown(rows: Sequence[BenchmarkRow]) -> str:
    """Return the tables in Markdown, the reasons of failed rows, and the article's table."""
    parts = []
    for _, group in groupby(rows, key=_subject):
        own = list(group)
        table = _table(own)
        parts += [f"{table.title}:", _as_markdown(table)]
        failed = [f"- `{row.configuration}` failed: {row.error}" for row in own if row.error is not None]
        parts += ["\n".join(failed)] if failed else []
        article = _article(own)
        parts += ["The article's figures beside measured ones, in GB of 10^9 bytes:", _as_markdown(article)] * bool(
            article.rows
        )
    return "\n\n".join(parts) + "\n"


def _subject(row: BenchmarkRow) -> tuple[object, ...]:
    return (row.model, row.device, row.prompt_len, row.max_new_tokens, row.batch_size)


def _table(rows: list[BenchmarkRow]) -> Table:
    first = rows[0]
    total = "resident set" if first.on_cpu else "nvidia-smi"
    sizes = {name: _unit(rows, name) for name in ("weights", "kv_cache", "peak", "process_total")}
    labels = {"weights": "weights", "kv_cache": "KV cache", "peak": "peak", "process_total": total}
    columns = (
        "row",
        *(f"{labels[name]}, {unit}" for name, (_, unit, _) in sizes.items()),
        "error",
        "first token, ms",
        "ms a token",
        "p90, ms",
        "tokens/J",
    )
    cells = []
    for row in rows:
        name = Cell(row.configuration)
        if row.error is not None:
            cells.append((name, Cell("failed"), *[Cell(_NOTHING)] * (len(columns) - 2)))
            continue
        error = row.deviation("process_total")
        cells.append(
            (
                name,
                *(_pair(row, part, factor, digits) for part, (factor, _, digits) in sizes.items()),
                Cell(_NOTHING if error is None else f"{error:+.1%}"),
                _pair(row, "first_token_ms", 1, 1),
                _pair(row, "ms_per_token", 1, 1),
                Cell(_number(row.measured.get("ms_per_token_p90"), 1, 1)),
                Cell(_number(row.measured.get("tokens_per_joule"), 1, 3)),
            )
        )
    title = (
        f"{first.model}, {first.prompt_len:,} + {first.max_new_tokens:,} tokens, batch {first.batch_size}, "
        f"on {first.device}, {', '.join(f'{name} {number}' for name, number in first.versions.items())}, {first.date}"
    )
    return Table(title, columns, cells)


def _unit(rows: list[BenchmarkRow], name: str) -> tuple[int, str, int]:
    """The unit of a column by its largest figure, with the number of decimals."""
    most = max((row.measured.get(name) or 0 for row in rows), default=0)
    return next((unit for unit in _UNITS if most >= unit[0]), _UNITS[-1])


def _pair(row: BenchmarkRow, name: str, factor: int, digits: int) -> Cell:
    return Cell(*(_number(found.get(name), factor, digits) for found in (row.measured, row.predicted)))


def _number(value: Figure, factor: int, digits: int) -> str:
    return _NOTHING if value is None else f"{value / factor:,.{digits}f}"


def _article(rows: list[BenchmarkRow]) -> Table:
    """The article's rows that ran with its workload on a GPU."""
    columns = ("row", "source", "weights", "KV cache", "total", "ms a token")
    parts = ("weights", "kv_cache", "process_total")
    cells = []
    for row in rows:
        claim = CLAIMS.get(row.configuration)
        same = all(getattr(row, name) == value for name, value in CLAIMED_WORKLOAD.items())
        if claim is None or not same or row.on_cpu or row.error is not None:
            continue
        claimed = [_number(getattr(claim, name), 10**9, 1) for name in parts]
        measured = [_number(row.measured.get(name), 10**9, 2) for name in parts]
        measured.append(_number(row.measured.get("ms_per_token"), 1, 1))
        cells.append(tuple(map(Cell, (row.configuration, f"article: {claim.text}", *claimed, str(claim.ms_per_token)))))
        cells.append(tuple(map(Cell, (row.configuration, "measured", *measured))))
    return Table("", columns, cells)


def _as_markdown(table: Table) -> str:
    texts = [
        [one.measured if one.predicted is None else f"{one.predicted} / {one.measured}" for one in cells]
        for cells in table.rows
    ]
    for line in texts:
        line[0] = f"`{line[0]}`"
    lines = [table.columns, ("---", *["--:"] * (len(table.columns) - 1)), *texts]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
