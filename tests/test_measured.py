"""Floor 1 against memory that was measured on a GPU (tests/data/README.md says how)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.replay_generation import _Generation
from qwen_vram.arithmetic.replay_load import replay_load
from qwen_vram.arithmetic.replay_products import workspaces

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "h200.jsonl").read_text().splitlines()]
WEIGHTS = {"bf16": "bf16", "nf4-dq": "nf4", "nf4": "nf4-plain", "int8": "int8"}
PLAIN = [row for row in ROWS if "quant" in row and not row.get("cache_implementation") and "error" not in row]
SIXTEEN_BIT = [row for row in PLAIN if row["what"] in ("gen", "fwd") and row["quant"] == "bf16"]
FOUR_BIT = [row for row in PLAIN if row["what"] in ("gen", "fwd") and row["quant"].startswith("nf4")]
INT8 = [row for row in PLAIN if row["what"] in ("gen", "fwd") and row["quant"] == "int8"]
LOADS = [row for row in PLAIN if row["what"] == "load"]


def label(row):
    keys = ("what", "size", "quant", "attn", "b", "s", "new", "prefill_chunk_size")
    return "-".join(str(row[key]) for key in keys if key in row)


def predict(row):
    return qv.estimate_vram(
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


def test_there_are_rows():
    assert (len(SIXTEEN_BIT), len(FOUR_BIT), len(INT8), len(LOADS)) == (45, 55, 24, 21)


@pytest.mark.parametrize("row", SIXTEEN_BIT, ids=label)
def test_the_peak_of_16_bit_weights(row):
    assert -0.003 <= predict(row).peak_allocated / row["peak"] - 1 <= 0.005


@pytest.mark.parametrize("row", FOUR_BIT, ids=label)
def test_the_peak_of_4_bit_weights(row):
    assert -0.003 <= predict(row).peak_allocated / row["peak"] - 1 <= 0.005


def as_measured(row):
    """Peaks of a row's first generation, of one token, and of the one that follows it, over what was there before.

    A `gen` row's `peak` is of the latter: no segment was given back between, and a block that the first one left may be
    up to 1 MiB larger than the tensor that the second one puts there.
    """
    estimate = predict(row)
    allocator = replay_load(estimate.architecture, estimate.profile).copy()
    one, peaks = replace(estimate.workload, max_new_tokens=1), []
    for workload in (one, estimate.workload) if row["what"] == "gen" else (estimate.workload,):
        allocator.peak = allocator.allocated
        generation = _Generation(allocator, estimate.architecture, estimate.profile, workload)
        generation.warm = generation.warm_lt = bool(peaks)
        generation.run()
        peaks.append(row["base"] + allocator.peak - allocator.allocated)
    return peaks


@pytest.mark.parametrize("row", [*SIXTEEN_BIT, *FOUR_BIT, *INT8], ids=label)
def test_the_peak_as_it_was_measured(row):
    *first, peak = as_measured(row)
    highest = 0.01 if row["quant"] == "int8" else 0.005
    assert -0.003 <= peak / row["peak"] - 1 <= highest
    assert all(-0.003 <= before / row["prefill_peak"] - 1 <= highest for before in first)


@pytest.mark.parametrize("row", LOADS, ids=label)
def test_loading(row):
    estimate = predict(row)
    resting = estimate.weights + estimate.workspace - sum(workspaces(estimate.architecture, estimate.profile))
    assert resting / (row["weights"] - row["base"]) - 1 == pytest.approx(0, abs=0.001)
    assert estimate.load_peak / (row["load_peak"] - row["base"]) - 1 == pytest.approx(0, abs=0.001)
