"""The estimator's error against every measured row of tests/data, by weights and part.

Usage: python benchmarks/measured_rows.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import qwen_vram as qv
from qwen_vram.arithmetic.replay.linear import CUBLAS_WORKSPACE, workspaces

ROWS = Path(__file__).parent.parent / "tests" / "data" / "h200.jsonl"
WEIGHTS = {"bf16": "bf16", "nf4-dq": "nf4", "nf4": "nf4-plain", "int8": "int8"}


def errors(row: dict) -> dict[str, float]:
    """Relative error of each part that the row measured."""
    estimate = qv.estimate_vram(
        f"Qwen2.5-{row['size']}",
        weights=WEIGHTS[row["quant"]],
        attention=row["attn"],
        dequantization="whole",
        prompt_len=row.get("s", 512),
        max_new_tokens=row.get("new", 1),
        batch_size=row.get("b", 1),
        prefill_chunk_size=row.get("prefill_chunk_size"),
        logits="all" if row["what"] == "fwd" else "last",
    )
    if row["what"] == "load":
        resting = estimate.weights + estimate.workspace - sum(workspaces(estimate.architecture, estimate.profile))
        return {
            "loaded": resting / (row["weights"] - row["base"]) - 1,
            "load_peak": estimate.load_peak / (row["load_peak"] - row["base"]) - 1,
        }
    # The process had run other models before, and held what cuBLASLt keeps for those; int8 does not take it.
    held = sum(CUBLAS_WORKSPACE) - sum(workspaces(estimate.architecture, estimate.profile))
    return {
        "peak_allocated": (estimate.peak_allocated + held) / row["peak"] - 1,
        "peak_reserved": estimate.peak_reserved / row["reserved"] - 1,
    }


def main() -> None:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in map(json.loads, ROWS.read_text().splitlines()):
        if row["what"] in ("load", "gen", "fwd") and not row.get("cache_implementation") and "error" not in row:
            for part, error in errors(row).items():
                found[WEIGHTS[row["quant"]], part].append(error)
    print(f"{'weights':10} {'part':15} {'rows':>4} {'lowest':>8} {'highest':>8} {'too low':>8}")
    for (weights, part), values in sorted(found.items()):
        low = sum(value < 0 for value in values) / len(values)
        print(f"{weights:10} {part:15} {len(values):4} {min(values):8.2%} {max(values):8.2%} {low:8.0%}")


if __name__ == "__main__":
    main()
