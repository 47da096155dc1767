"""Floor 1 against memory that was measured on a GPU (tests/data/README.md says how)."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.replay.allocator import CachingAllocator
from qwen_vram.arithmetic.replay.generation import Generation
from qwen_vram.arithmetic.replay.linear import CUBLAS_WORKSPACE, workspaces
from qwen_vram.arithmetic.replay.load import load_into

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "data" / "h200.jsonl").read_text().splitlines()]
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


@pytest.mark.parametrize("row", INT8, ids=label)
def test_the_first_peak_of_int8_weights(row):
    # The process had run other models before, and held what cuBLASLt keeps for those, which int8 does not take.
    first = predict({**row, "new": 1})
    assert -0.003 <= (first.peak_allocated + CUBLAS_WORKSPACE[1]) / row.get("prefill_peak", row["peak"]) - 1 <= 0.003


def process(row):
    """The rows of one model in one process in their order: its load and what it ran, up to the next load."""
    start = max(index for index, load in enumerate(PLAIN[: PLAIN.index(row) + 1]) if load["what"] == "load")
    following = (index for index in range(start + 1, len(PLAIN)) if PLAIN[index]["what"] == "load")
    return PLAIN[start : next(following, len(PLAIN))]


def run(allocator, row, *new, warm=True):
    """One generation after the other, of so many tokens: the most allocated in each, and what was reserved after it.

    Unused segments were given back before the first, not between: a block that one left may be up to 1 MiB larger than
    the tensor that the next one puts there. Over `base`: bitsandbytes keeps the numbers of a product's outlier columns.
    """
    allocator.release_unused()
    resting, estimate, found = allocator.allocated, predict(row), []
    for tokens in new:
        allocator.peak = allocator.allocated
        workload = replace(estimate.workload, max_new_tokens=tokens)
        generation = Generation(allocator, estimate.architecture, estimate.profile, workload)
        generation.warm = generation.warm_lt = warm
        generation.run()
        warm = True
        found.append((row["base"] + allocator.peak - resting, allocator.reserved))
    return found


@cache
def replayed(start):
    """The process from this row of `PLAIN` on, through one allocator: label of each run -> what `run` found."""
    load, *rows = process(PLAIN[start])
    estimate = predict(load)
    before = CUBLAS_WORKSPACE if load["base"] > sum(CUBLAS_WORKSPACE) else ()

    allocator = CachingAllocator()
    for size in (512, *before):
        allocator.take(size)
    load_into(allocator, estimate.architecture, estimate.profile)
    short = {**load, "what": "gen", "s": 16}
    short.pop("prefill_chunk_size", None)
    run(allocator, short, 1, 4, warm=bool(before))  # not a row, but what was run after every load
    return {label(row): run(allocator, row, *((1, row["new"]) if row["what"] == "gen" else (1,))) for row in rows}


def as_measured(row):
    return replayed(PLAIN.index(process(row)[0]))[label(row)]


@pytest.mark.parametrize("row", [*SIXTEEN_BIT, *FOUR_BIT, *INT8], ids=label)
def test_the_peak_as_it_was_measured(row):
    *first, (peak, _) = as_measured(row)
    assert -0.003 <= peak / row["peak"] - 1 <= 0.003
    assert all(-0.001 <= before / row["prefill_peak"] - 1 <= 0.001 for before, _ in first)


@pytest.mark.parametrize("row", [row for row in [*SIXTEEN_BIT, *FOUR_BIT] if row["what"] == "fwd"], ids=label)
def test_the_peak_of_a_plain_forward_to_the_byte(row):
    assert as_measured(row)[-1][0] == row["peak"]


@pytest.mark.parametrize("row", [row for row in INT8 if row["size"] != "7B"], ids=label)
def test_what_int8_reserved_as_it_was_measured(row):
    # 7B's layers differ by hundreds of columns that hold outliers, and so do their blocks.
    *_, (_, reserved) = as_measured(row)
    assert -0.003 <= reserved / row["reserved"] - 1 <= 0.005


@pytest.mark.parametrize("row", LOADS, ids=label)
def test_loading(row):
    estimate = predict(row)
    resting = estimate.weights + estimate.workspace - sum(workspaces(estimate.architecture, estimate.profile))
    assert resting / (row["weights"] - row["base"]) - 1 == pytest.approx(0, abs=0.001)
    assert estimate.load_peak / (row["load_peak"] - row["base"]) - 1 == pytest.approx(0, abs=0.001)
