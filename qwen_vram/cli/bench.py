"""`qwen-vram bench`: configurations of a model, predicted beside measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import qwen_vram as qv
from qwen_vram.cli.consoles import console, errors

_FORMATS = (".svg", ".png", ".pdf")
# The fewest columns of a table.
_WIDTH = 118


def bench(
    model: Annotated[str | None, typer.Argument(help="Catalog name, checkpoint folder or hub id.")] = None,
    rows: Annotated[str | None, typer.Option(help="Names of rows, with commas between; default: all.")] = None,
    prompt_len: Annotated[str, typer.Option(help="Prompt tokens of a sequence: a number, or several as 512,4096.")] = (
        "512"
    ),
    max_new_tokens: Annotated[str, typer.Option(help="Tokens generated after it: a number or several.")] = "512",
    batch_size: Annotated[str, typer.Option(help="Sequences at once: a number or several.")] = "1",
    vram: Annotated[str | None, typer.Option(help="Budgets of further plans, such as 8GiB or 4GiB,8GiB.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the GPU if there is one.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Append the rows; those in it are not rerun.")] = None,
    timeout: Annotated[float, typer.Option(help="The most seconds of a row.")] = 600.0,
    read: Annotated[str | None, typer.Option(metavar="FILE", help="Show the rows of a file; measure nothing.")] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Write the tables in Markdown.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the rows (.svg, .png, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each row, and nothing else.")] = (
        False
    ),
) -> None:
    """Measure a model in several configurations, each in a fresh process, beside the predictions."""
    if (model is None) == (read is None):
        raise typer.BadParameter("name a MODEL to measure, or --read FILE")
    _check_files(markdown, plot)
    found = _measured(
        model,
        as_json,
        rows=None if rows is None else [name.strip() for name in rows.split(",")],
        prompt_len=_numbers("--prompt-len", prompt_len),
        max_new_tokens=_numbers("--max-new-tokens", max_new_tokens),
        batch_size=_numbers("--batch-size", batch_size),
        vram=None if vram is None else [size.strip() for size in vram.split(",")],
        device=device,
        out=out,
        timeout=timeout,
    ) if model is not None else _read(str(read), as_json)  # fmt: skip
    if markdown is not None:
        Path(markdown).write_text(found.markdown(), encoding="utf-8")
    if plot is not None and len(found.failed) < len(found.rows):
        found.plot(plot)
    if not as_json:
        _show(found)
    if found.failed:
        raise SystemExit(1)


def _measured(model: str, as_json: bool, **asked: object) -> qv.Benchmark:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("rows", total=None)

        def on_row(row: qv.BenchmarkRow, number: int, of: int) -> None:
            progress.update(task, completed=number, total=of, description=row.configuration)
            if as_json:
                print(json.dumps(row.to_dict()), flush=True)

        return qv.bench(model, on_row=on_row, **asked)  # type: ignore[arg-type]


def _read(path: str, as_json: bool) -> qv.Benchmark:
    found = qv.Benchmark(tuple(qv.read_benchmark(path)))
    if as_json:
        for row in found.rows:
            print(json.dumps(row.to_dict()))
    return found


def _show(found: qv.Benchmark) -> None:
    from qwen_vram.benchmark.table import tables

    wide = Console(width=max(console.width, _WIDTH))  # a narrow table would lose digits
    for one in tables(found.rows):
        wide.print(one.title, style="bold", highlight=False)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        first, *others = one.columns
        table.add_column(first, no_wrap=True)
        table.add_column("", no_wrap=True)
        for column in others:
            table.add_column(column, justify="right")
        for name, *cells in one.rows:
            texts = [
                cell.measured if cell.predicted is None else f"{cell.predicted}\n{cell.measured}" for cell in cells
            ]
            both = any(cell.predicted is not None for cell in cells)
            table.add_row(name.measured, "predicted\nmeasured" if both else "", *texts)
        wide.print(table)
    for row in found.failed:
        errors.print(f"{row.configuration}: {row.error}", style="red", markup=False, highlight=False, soft_wrap=True)


def _numbers(option: str, text: str) -> list[int]:
    """Return `"512,4096"` as numbers."""
    entries = [entry.strip() for entry in text.split(",")]
    for entry in entries:
        if not entry.isdecimal():
            raise qv.WorkloadError(
                f"{option} must be a positive whole number, or several as 512,4096; got {text!r}",
                name=option,
                got=text,
            )
    return [int(entry) for entry in entries]


def _check_files(markdown: str | None, plot: str | None) -> None:
    """Refuse files that could not be written, before anything is measured."""
    if plot is not None and Path(plot).suffix not in _FORMATS:
        raise qv.UnknownNameError("format of --plot", Path(plot).suffix, _FORMATS)
    for option, name in (("--markdown", markdown), ("--plot", plot)):
        if name is not None and not Path(name).absolute().parent.is_dir():
            raise typer.BadParameter(f"{option} {name!r} is in a folder that does not exist; make the folder first")
    if plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            install = 'pip install "qwen-vram[plot]"'
            raise qv.BackendUnavailableError(
                f"--plot needs matplotlib, which is not installed; run: {install}",
                backend="matplotlib",
                install=install,
            ) from error
