"""Floor 1 against memory that was measured on a GPU (tests/data/README.md says how)."""

import json
from pathlib import Path

import pytest

import qwen_vram as qv

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "h200.jsonl").read_text().splitlines()]
SIXTEEN_BIT = [row for row in ROWS if row.get("quant") == "bf16" and not row.get("cache_implementation")]
RUNS = [row for row in SIXTEEN_BIT if row["what"] in ("gen", "fwd") and "error" not in row]
LOADS = [row for row in SIXTEEN_BIT if row["what"] == "load"]


def label(row):
    return "-".join(str(row.get(key, "")) for key in ("what", "size", "attn", "b", "s", "prefill_chunk_size"))


def predict(row):
    return qv.estimate_vram(
        f"Qwen2.5-{row['size']}",
        attention=row["attn"],
        prompt_len=row.get("s", 512),
        max_new_tokens=row.get("new", 1),
        batch_size=row.get("b", 1),
        prefill_chunk_size=row.get("prefill_chunk_size"),
        logits="all" if row["what"] == "fwd" else "last",
    )


def test_there_are_rows():
    assert len(RUNS) > 40


@pytest.mark.parametrize("row", RUNS, ids=label)
def test_the_peak_of_16_bit_weights(row):
    error = predict(row).peak_allocated / row["peak"] - 1
    assert -0.003 <= error <= 0.005


@pytest.mark.parametrize("row", LOADS, ids=label)
def test_16_bit_weights_and_their_load_peak(row):
    estimate = predict(row)
    assert estimate.weights / (row["weights"] - row["base"]) - 1 == pytest.approx(0, abs=0.003)
    assert estimate.load_peak / (row["load_peak"] - row["base"]) - 1 == pytest.approx(0, abs=0.003)
