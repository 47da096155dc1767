"""Floor 1 against what `python -m qwen_vram.tools.accuracy` measured of our own loader on a GPU."""

import json
from pathlib import Path

import pytest

from qwen_vram.tools.accuracy import read_rows
from qwen_vram.tools.accuracy_report import KEPT_FROM, is_held_out, predict, report

ROWS = read_rows(Path(__file__).parents[1] / "data")
DOCS = Path(__file__).parents[2] / "docs"


def label(row):
    return f"{row['model']}-{row['weights']}-{'-'.join(map(str, row['knobs'].values()))}-{row['prompt_len']}"


def error(row, part):
    return getattr(predict(json.dumps(row)), part) / row["measured"][part] - 1


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_weights_and_load_peak(row):
    assert error(row, "weights") == 0
    assert error(row, "load_peak") == pytest.approx(0, abs=0.0003)


PROMISED = {
    "peak_allocated": (-0.003, 0.005),
    "peak_reserved": (-0.01, 0.06),
    "process_total": (-0.01, 0.06),
}


@pytest.mark.parametrize("part", PROMISED)
@pytest.mark.parametrize("row", ROWS, ids=label)
def test_the_peaks(row, part):
    lowest, highest = PROMISED[part]
    assert lowest <= error(row, part) <= highest


def test_the_page_is_what_the_tool_writes():
    written, _, _ = (DOCS / "accuracy.md").read_text().partition("\n" + KEPT_FROM)
    assert written == report(ROWS)


def test_something_is_held_out():
    assert 0 < sum(map(is_held_out, ROWS)) < len(ROWS)
