"""A fleet plan as text of at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from qwen_vram.fleet.data import Fleet, FleetOption
from qwen_vram.units import format_bytes

WIDTH = 80
_PARTS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "graphs": "CUDA graphs",
    "context": "CUDA context",
    "communication": "communication",
    "free": "free",
    "total": "card",
}

# Columns with texts, the spaces between columns, and the columns that a narrow table leaves out, in this order.
_LEFT, _GAP, _DROPPED = {"GPU", "weights"}, 2, ("TTFT p50", "total", "seqs")


def columns(options: Sequence[FleetOption]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and the cells of each option."""
    priced = any(option.price_per_hour is not None for option in options)
    names = ["GPUs", "GPU", "weights", "replicas", "seqs", "tok/s p10", "total", "TTFT p50", "TTFT p99", "met"]
    rows = []
    for option in options:
        service = option.service
        cells = [
            str(option.gpus),
            option.gpu,
            option.weights,
            f"{option.replicas} x {option.tensor_parallel}",
            str(option.limits.sequences),
            f"{service.user_tokens_per_second[10]:.1f}",
            f"{service.total_tokens_per_second:,.0f}",
            f"{service.first_token_seconds[50]:.2f}",
            f"{service.first_token_seconds[99]:.2f}",
            f"{service.share:.0%}",
        ]
        if priced:
            cells.insert(1, f"{option.price_per_hour:,.2f}")
        rows.append(cells)
    if priced:
        names.insert(1, "per hour")
    return names, rows


def memory_rows(option: FleetOption) -> list[tuple[str, int]]:
    """Return the parts of one card's memory that are not 0, with their names."""
    parts = option.memory._asdict()
    return [(label, parts[name]) for name, label in _PARTS.items() if parts[name]]


def headline(plan: Fleet) -> list[str]:
    """Return what was asked for, in lines."""
    asked = plan.question
    arriving = f"{asked.rate:.2f} requests/s" if asked.arrivals is None else f"{len(asked.arrivals):,} given arrivals"
    return [
        f"{plan.label} for {asked.users:,} users, {plan.engine.name}, {arriving}",
        f"prompts of {asked.prompts} tokens, answers of {asked.answers}",
        f"wish of {asked.wish.share:.0%}: {asked.wish.tokens_per_second:g} tokens/s each, first token within "
        f"{asked.wish.first_token_seconds:g} s",
    ]


def table(options: Sequence[FleetOption]) -> list[str]:
    """Return the lines of the table; columns that others tell nearly the same are left out until it fits."""
    names, rows = columns(options)
    while True:
        widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
        droppable = [name for name in _DROPPED if name in names]
        if sum(widths) + _GAP * (len(widths) - 1) <= WIDTH or not droppable:
            break
        place = names.index(droppable[0])
        names, rows = _without(names, place), [_without(row, place) for row in rows]
    lines = []
    for cells in (names, *rows):
        shown = [
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for name, cell, width in zip(names, cells, widths, strict=True)
        ]
        lines.append((" " * _GAP).join(shown).rstrip())
    return lines


def _without(cells: list[str], place: int) -> list[str]:
    return cells[:place] + cells[place + 1 :]


def text(plan: Fleet) -> str:
    """Return the plan as text."""
    lines = [part for line in headline(plan) for part in wrap(line, WIDTH)]
    lines += table(plan.options)
    lines.append("")
    best = plan.best
    lines.append(f"memory of each {best.gpu}, bytes")
    for label, nbytes in memory_rows(best):
        lines.append(f"  {label:15}{nbytes:>19,}  {format_bytes(nbytes):>10}")
    lines += [part for note in plan.notes for part in wrap(note, WIDTH, subsequent_indent="  ")]
    return "\n".join(lines)
