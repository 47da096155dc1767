"""Tables of estimates and plans for the terminal."""

from __future__ import annotations

from rich.table import Table

import qwen_vram as qv
from qwen_vram.arithmetic import render
from qwen_vram.cli.consoles import console


def show_estimate(result: qv.Estimate) -> None:
    """Print an estimate as a table."""
    shown, table = result.shown(), Table()
    table.add_column("")
    for name in ("bytes", "GB (10^9)", "GiB (2^30)", "share"):
        table.add_column(name, justify="right")
    for label, size, share in render.rows(shown):
        percent = "" if share is None else f"{share:.1%}"
        table.add_row(label, f"{size:,}", f"{size / 10**9:.2f}", f"{size / 2**30:.2f}", percent)
        if label == "workspace":
            table.add_section()
    console.print(shown.headline, style="bold", soft_wrap=True, highlight=False)
    console.print(table)
    if result.devices:
        (corner, names), *rows = render.by_device(shown)
        each = Table(corner, *names)
        for column in each.columns[1:]:
            column.justify = "right"
        for label, texts in rows:
            each.add_row(label, *texts)
        console.print(each)


def show_steps(result: qv.Plan) -> None:
    """Print a plan's search as a table, the chosen step last."""
    table = Table()
    table.add_column("step")
    table.add_column("needs (GiB)", justify="right")
    table.add_column("saves (GiB)", justify="right")
    table.add_column("cost")
    for step in result.steps:
        saves = f"{step.saved_bytes / 2**30:.2f}" if step.saved_bytes else ""
        table.add_row(step.change, f"{step.needed_bytes / 2**30:.2f}", saves, step.cost)
    console.print(
        f"plan for {result.estimate.model}, {result.budget_text}", style="bold", soft_wrap=True, highlight=False
    )
    console.print(table)
