"""What benchmarks share: cells, each in a fresh process, its row appended at once, none run twice; times a token."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from caps import read

from qwen_vram.tools.accuracy import make_checkpoint
from qwen_vram.tools.fresh_process import call_each

Cell = dict[str, Any]


def run_missing(
    out: Path,
    cells: Iterable[Cell],
    measure: Callable[[str, Cell], Cell],
    model: str,
    *,
    checkpoint: Path | None = None,
) -> int:
    """Measure the cells that are not in `out` yet; how many failed.

    Args:
        measure: Called with the checkpoint's folder and a cell, in a process of its own, one after another; the row
            that it returns has the cell under `"cell"`.
        model: A catalog name, whose shape gets random weights in TMPDIR; or `checkpoint` is loaded.
    """
    done = read(out)
    missing = [cell for cell in cells if json.dumps(cell, sort_keys=True) not in done]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="qwen_vram_cells_") as made:
        if missing and checkpoint is None:
            for ended in call_each(partial(make_checkpoint, folder=Path(made)), [model]):
                if ended.error:
                    raise SystemExit(f"{model} cannot be made:\n{ended.error}")
        for ended in call_each(partial(measure, str(checkpoint or made)), missing):
            if ended.error:
                failed += 1
                print(f"{ended.item} failed:\n{ended.error[-3000:]}", file=sys.stderr, flush=True)
                continue
            print(json.dumps(ended.value), flush=True)
            with out.open("a") as file:
                file.write(json.dumps(ended.value) + "\n")
    return failed


def ms_per_token(generate: Callable[[int], Any], *, short: int, long: int, rounds: int = 2) -> float:
    """Milliseconds of a decode step: of the last of so many rounds, after one short generation."""
    settle = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    generate(short)
    for _ in range(rounds):
        times = []
        for new in (short, long):
            settle()
            began = time.perf_counter()
            generate(new)
            settle()
            times.append(time.perf_counter() - began)
    return 1_000 * (times[1] - times[0]) / (long - short)
