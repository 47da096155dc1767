"""Floor 1 against what `python -m qwen_vram.tools.accuracy` measured of our own loader on a GPU."""

import json
from pathlib import Path

import pytest

import qwen_vram as qv

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "h100.jsonl").read_text().splitlines()]


def label(row):
    return f"{row['model']}-{row['weights']}-{'-'.join(map(str, row['knobs'].values()))}-{row['prompt_len']}"


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_the_estimate_holds(row):
    workload = {name: row[name] for name in ("prompt_len", "max_new_tokens", "batch_size")}
    estimate = qv.estimate_vram(row["model"], weights=row["weights"], **row["knobs"], **workload)
    measured = {part: values["measured"] for part, values in row["parts"].items()}
    assert estimate.weights == measured["weights"]
    assert estimate.load_peak == pytest.approx(measured["load_peak"], rel=0.0001)
    assert -0.001 <= estimate.peak_allocated / measured["peak_allocated"] - 1 <= 0.001
