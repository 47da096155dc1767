"""A picture: memory and times of each row, predicted beside measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from qwen_vram.benchmark.row import BenchmarkRow
from qwen_vram.errors import BackendUnavailableError, WorkloadError

_INSTALL = 'pip install "qwen-vram[plot]"'
# Okabe and Ito's colors, which color-blind readers can tell apart.
_PREDICTED, _MEASURED = "#56B4E9", "#0072B2"
_HEIGHT = 0.38  # of a bar, in rows
_GIB = 2**30


def plot_rows(rows: Sequence[BenchmarkRow], out: str | Path) -> None:
    """Draw the rows that ran into a file, with a line of panels for each workload.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        WorkloadError: no row ran.
    """
    ran = [row for row in rows if row.error is None]
    if not ran:
        raise WorkloadError("there is no row to draw; each of them failed", name="rows", got=0)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            f"a plot needs matplotlib, which is not installed; run: {_INSTALL}", backend="matplotlib", install=_INSTALL
        ) from error
    groups = [list(group) for _, group in groupby(ran, key=_subject)]
    heights = [len(group) + 1.5 for group in groups]
    figure = Figure(figsize=(11, 0.42 * sum(heights) + 0.5), layout="constrained")
    grid: Any = figure.subplots(len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (left, right), group in zip(grid, groups, strict=True):
        names = [row.configuration for row in group]
        total = "resident set" if group[0].on_cpu else "nvidia-smi"
        _bars(left, names, [_figures(row, "process_total", _GIB) for row in group], f"whole process ({total}), GiB", 2)
        _bars(right, names, [_figures(row, "ms_per_token", 1) for row in group], "ms a token (median)", 1)
        right.tick_params(labelleft=False)
        left.set_title(_title(group[0]), loc="left", fontsize="medium")
    handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize="small")
    figure.savefig(Path(out), dpi=150)


def _bars(axes: Any, names: list[str], figures: list[tuple[float, float]], label: str, digits: int) -> None:
    places = range(len(names))
    for offset, color, kind, number in ((-0.5, _PREDICTED, "predicted", 0), (0.5, _MEASURED, "measured", 1)):
        values = [pair[number] for pair in figures]
        bars = axes.barh([place + offset * _HEIGHT for place in places], values, _HEIGHT, color=color, label=kind)
        texts = ["" if value != value else f"{value:,.{digits}f}" for value in values]
        axes.bar_label(bars, texts, padding=3, fontsize="x-small")
    axes.set_yticks(list(places), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.15)
    nothing = all(pair[0] != pair[0] for pair in figures)
    axes.set_xlabel(f"{label}, not predicted" if nothing else label)
    axes.spines[["top", "right"]].set_visible(False)


def _figures(row: BenchmarkRow, name: str, factor: int) -> tuple[float, float]:
    """Predicted and measured figures of a row; not a number if one is not known."""
    predicted, measured = row.predicted.get(name), row.measured.get(name)
    nothing = float("nan")
    return (
        nothing if predicted is None else predicted / factor,
        nothing if measured is None else measured / factor,
    )


def _subject(row: BenchmarkRow) -> tuple[object, ...]:
    return (row.model, row.device, row.prompt_len, row.max_new_tokens, row.batch_size)


def _title(row: BenchmarkRow) -> str:
    lengths = f"{row.prompt_len:,} + {row.max_new_tokens:,} tokens, batch {row.batch_size}"
    return f"{Path(row.model).name}, {lengths}, {row.device}"
