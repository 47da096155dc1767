"""The tables of `docs/accuracy.md`, made of measured rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.estimator import estimate_vram
from qwen_vram.spec.formats import FORMATS

PARTS = ("weights", "load_peak", "peak_allocated", "peak_reserved", "process_total")
# What no formula was derived on.
HELD_OUT_MODELS = ("Qwen2.5-14B", "Qwen3-4B")
HELD_OUT_WEIGHTS = ("fp4",)
# Headline of what stays where the tables above it are written anew.
KEPT_FROM = "## Beside other estimators"

Row = dict[str, Any]


def report(rows: list[Row]) -> str:
    """Markdown: where and how it was measured, errors by format and part, held-out errors, and every row.

    Predictions are made anew, so that the tables are those of the estimator as it is.
    """
    made_on = (
        f"{row['device']}, torch {row['torch']}, transformers {row['transformers']}, {row['date']}" for row in rows
    )
    where = "; ".join(dict.fromkeys(made_on))
    later = sum(not row.get("fresh_process", True) for row in rows)
    reused = f" ({later} of them, of an earlier version, after other runs in theirs)" if later else ""
    held_out = [row for row in rows if is_held_out(row)]
    derived = [row for row in rows if not is_held_out(row)]
    sections = [
        "# Predicted beside measured",
        f"Written by `python -m qwen_vram.tools.accuracy`. {where}. Random weights of the published shapes, loaded and "
        f"run by this library, a fresh process for each run{reused}. "
        '`error = predicted / measured - 1`; "too low" is the share of cells with any byte too few.',
    ]
    for title, chosen in (("On what the formulas were derived on", derived), ("Held out", held_out)):
        if chosen:
            models = ", ".join(dict.fromkeys(f"{row['model']}" for row in chosen))
            sections += [f"## {title}", f"{models}; {len(chosen)} runs.", table(chosen)]
    return "\n\n".join([*sections, "## Every run", "\n".join(_every(rows))]) + "\n"


def is_held_out(row: Row) -> bool:
    """Tell if no formula was derived on the row's shape or format."""
    return row["model"] in HELD_OUT_MODELS or row["weights"] in HELD_OUT_WEIGHTS


def errors(row: Row) -> Iterator[tuple[str, float]]:
    """Part and relative error, of those that were measured."""
    estimate = predict(json.dumps(row))
    for part in PARTS:
        if row["measured"].get(part):
            yield part, getattr(estimate, part) / row["measured"][part] - 1


@lru_cache(maxsize=1024)
def predict(row: str) -> Estimate:
    """What is estimated for a row of JSON."""
    one = json.loads(row)
    workload = {name: one[name] for name in ("prompt_len", "max_new_tokens", "batch_size")}
    return estimate_vram(one["model"], weights=one["weights"], **one["knobs"], **workload)


def table(rows: list[Row]) -> str:
    """By weights and part: cells, mean and extreme errors, and the share that was too low.

    int8 has rows of its own for whole products: with them, memory depends on the data.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        whole = FORMATS[row["weights"]].has_outliers and row["knobs"].get("dequantization") == "whole"
        for part, error in errors(row):
            found[f"`{row['weights']}`{' whole' if whole else ''}", part].append(error)
    lines = ["| weights | part | cells | mean | lowest | highest | too low |", "|---|---|---|---|---|---|---|"]
    for (weights, part), values in found.items():
        mean, low = sum(values) / len(values), sum(value < 0 for value in values) / len(values)
        spread = f"{mean:+.2%} | {min(values):+.2%} | {max(values):+.2%} | {low:.0%}"
        lines.append(f"| {weights} | `{part}` | {len(values)} | {spread} |")
    return "\n".join(lines)


def _every(rows: list[Row]) -> Iterator[str]:
    yield "Peak allocated in bytes as measured; then the errors of the peak allocated, reserved, and of the process."
    yield ""
    yield "| model | weights | knobs | batch | prompt | allocated | error | reserved | process |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        knobs = " ".join(f"{name}={value}" for name, value in row["knobs"].items())
        error = dict(errors(row))
        allocated = row["measured"]["peak_allocated"]
        shown = " | ".join(
            f"{error[part]:+.2%}" if part in error else "-"
            for part in ("peak_allocated", "peak_reserved", "process_total")
        )
        named = f"| {row['model']} | {row['weights']} | {knobs} | {row['batch_size']} | {row['prompt_len']:,} "
        yield f"{named}| {allocated:,} | {shown} |"
