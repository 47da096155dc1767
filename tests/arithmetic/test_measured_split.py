"""Estimates of two GPUs against `benchmarks/results/split.jsonl`, which `benchmarks/split.py` measured."""

import json
from pathlib import Path

import pytest

from qwen_vram.arithmetic.gpu_split import split_estimate
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.planning.search.search import Search
from qwen_vram.spec.machine import DEFAULT
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "split.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text().splitlines()]


def predicted(row):
    cell = row["cell"]
    label, architecture = resolve_model(cell["model"])
    workload = Workload(**{name: cell[name] for name in ("prompt_len", "max_new_tokens", "batch_size")})
    knobs = dict(cell["knobs"])
    split = {int(device): layers for device, layers in row["split"].items()}
    budget = Budget(vram=sum(cell["caps"]), ram=2**40, devices=dict(enumerate(cell["caps"])))
    if "profile" in row:
        return split_estimate(label, architecture, Profile(**row["profile"]), workload, split, machine=DEFAULT).devices
    # A row from before a row had its profile, when the search gave back no speed.
    found = Search(label, architecture, workload, budget, knobs.pop("profile", "auto"), knobs, machine=DEFAULT).find(
        "quality"
    )[0]
    return split_estimate(label, architecture, found.estimate.profile, workload, split, machine=DEFAULT).devices


@pytest.mark.parametrize("row", ROWS, ids=lambda row: json.dumps(row["cell"]))
def test_each_gpu_takes_what_was_predicted_of_it(row):
    assert row["ran"]
    for device, part in predicted(row).items():
        measured = {name: pair["measured"] for name, pair in row["devices"][str(device)].items()}
        assert part.weights == measured["weights"]
        assert part.peak_allocated == pytest.approx(measured["peak_allocated"], rel=0.001)
        beside = measured["process_total"] - measured["peak_reserved"]
        if row["cell"]["together"]:  # what earlier models of the process left beside torch is held when a plan is made
            assert row["devices"][str(device)]["process_total"]["predicted"] >= 0.99 * measured["process_total"]
        else:
            assert part.beside_torch >= beside
            assert part.process_total >= 0.99 * measured["process_total"]
