"""Tables of `docs/accuracy.md`, made from measured rows."""

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
# Models and formats that no formula was derived on.
HELD_OUT_MODELS = ("Qwen2.5-14B", "Qwen3-4B")
HELD_OUT_WEIGHTS = ("fp4",)
# Heading from which the page is kept if the tables above it are written again.
KEPT_FROM = "## Beside other estimators"

Row = dict[str, Any]


def report(rows: list[Row]) -> str:
    """Return the page in Markdown: the machines, errors by format and part, held-out errors, and every row.

    Predictions are computed again, so the tables show the present estimator.
    """
    made_on = (
        f"- {row['device']}, torch {row['torch']}, transformers {row['transformers']}, {row['date']}" for row in rows
    )
    machines = "\n".join(dict.fromkeys(made_on))
    later = sum(not row.get("fresh_process", True) for row in rows)
    reused = f", but {later} runs of an earlier version followed other runs in the same process" if later else ""
    held_out = [row for row in rows if is_held_out(row)]
    derived = [row for row in rows if not is_held_out(row)]
    sections = [
        "# Predicted and measured memory",
        "`python -m qwen_vram.tools.accuracy` writes this page. It compares predicted and measured memory on:",
        machines,
        "This library loads random weights of the published shapes and generates with them. "
        f"Each run has a fresh process{reused}.",
        '`error = predicted / measured - 1`. "Too low" is the share of cells with a prediction below the measurement.',
    ]
    for title, chosen in (("Models and formats that the formulas were derived on", derived), ("Held out", held_out)):
        if chosen:
            models = ", ".join(dict.fromkeys(f"{row['model']}" for row in chosen))
            sections += [f"## {title}", f"{models}; {len(chosen)} runs.", table(chosen)]
    return "\n\n".join([*sections, "## Every run", "\n".join(_every(rows))]) + "\n"


def is_held_out(row: Row) -> bool:
    """Tell if no formula was derived on the row's shape or format."""
    return row["model"] in HELD_OUT_MODELS or row["weights"] in HELD_OUT_WEIGHTS


def errors(row: Row) -> Iterator[tuple[str, float]]:
    """Yield each measured part and its relative error."""
    estimate = predict(json.dumps(row))
    for part in PARTS:
        if row["measured"].get(part):
            yield part, getattr(estimate, part) / row["measured"][part] - 1


@lru_cache(maxsize=1024)
def predict(row: str) -> Estimate:
    """Return the estimate for a row of JSON."""
    one = json.loads(row)
    workload = {name: one[name] for name in ("prompt_len", "max_new_tokens", "batch_size")}
    return estimate_vram(one["model"], weights=one["weights"], **one["knobs"], **workload)


def table(rows: list[Row]) -> str:
    """Return a table by weights and part: cells, mean and extreme errors, and the share that was too low.

    int8 has separate rows for products that are not tiled, because their memory depends on the data.
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
    yield "Measured peak of allocated memory in bytes, then the errors of the peaks: allocated, reserved, and process."
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
