"""Floor 1 against what `python -m qwen_vram.tools.accuracy` measured of our own loader on a GPU."""

import json
from pathlib import Path

import pytest

from qwen_vram.tools.accuracy import read_rows
from qwen_vram.tools.accuracy_report import KEPT_FROM, is_held_out, predict, report

ROWS = read_rows(Path(__file__).parent / "data")
DOCS = Path(__file__).parent.parent / "docs"


def label(row):
    return f"{row['model']}-{row['weights']}-{'-'.join(map(str, row['knobs'].values()))}-{row['prompt_len']}"


def error(row, part):
    return getattr(predict(json.dumps(row)), part) / row["measured"][part] - 1


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_weights_and_load_peak(row):
    assert error(row, "weights") == 0
    assert error(row, "load_peak") == pytest.approx(0, abs=0.0003)


# What every row is held to, and the few parts of rows that miss it: the lowest and the highest error that they have.
# Of free blocks of one size the allocator takes the one at the lowest address. Where the driver maps a segment is not
# known here: mostly below those before it, but in these two runs some went above the weights, keys and values into
# other blocks, and one more segment was taken. Recorded: NVIDIA H200, torch 2.11.0+cu130, 2026-11-26.
PROMISED = {
    "peak_allocated": (-0.003, 0.005),
    "peak_reserved": (-0.01, 0.06),
    "process_total": (-0.01, 0.06),
}
MISSES = {
    "Qwen2.5-7B-int8-sdpa-8192": {"peak_reserved": (-0.029, 0), "process_total": (-0.022, 0)},
    "Qwen3-4B-int8-sdpa-1024": {"peak_reserved": (-0.013, 0)},
}


@pytest.mark.parametrize("part", PROMISED)
@pytest.mark.parametrize("row", ROWS, ids=label)
def test_the_peaks(row, part):
    lowest, highest = MISSES.get(label(row), {}).get(part, PROMISED[part])
    assert lowest <= error(row, part) <= highest


def test_no_miss_is_of_a_row_that_is_gone():
    assert MISSES.keys() <= {label(row) for row in ROWS}


def test_the_page_is_what_the_tool_writes():
    written, _, _ = (DOCS / "accuracy.md").read_text().partition("\n" + KEPT_FROM)
    assert written == report(ROWS)


def test_something_is_held_out():
    assert 0 < sum(map(is_held_out, ROWS)) < len(ROWS)
