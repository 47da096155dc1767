"""Predicted beside measured memory on this machine's GPU: `python -m qwen_vram.tools.accuracy`.

Every model and format gets a fresh process, which loads random weights of the published shape with several sets of
knobs and generates from random tokens. Memory does not depend on the values of weights, but for int8's outliers, of
which trained models have their own. Rows go to `accuracy.jsonl`, the tables to `accuracy.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qwen_vram.tools.accuracy_report import KEPT_FROM, report

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen3-4B")
WEIGHTS = ("bf16", "nf4", "fp4", "int8")


class Case(NamedTuple):
    """One load with `knobs` and what it runs: (batch_size, prompt_len, max_new_tokens) each, the largest first."""

    knobs: dict[str, Any]
    workloads: tuple[tuple[int, int, int], ...]


_FUSED = {"attention": "fused", "cache": "preallocated"}
CASES = (
    Case({"attention": "sdpa"}, ((1, 8192, 16), (4, 1024, 16), (1, 512, 16))),
    Case(_FUSED, ((1, 8192, 16), (4, 1024, 16), (1, 512, 16))),
    Case({**_FUSED, "prefill_chunk_size": 1024, "embeddings": "host"}, ((1, 8192, 16),)),
    Case({"attention": "sdpa", "prefill_chunk_size": 1024}, ((1, 4096, 16),)),
    Case({"attention": "sdpa", "cache": "static"}, ((1, 4096, 16),)),
    Case({"attention": "eager"}, ((1, 2048, 16),)),
)


def make_checkpoint(model: str, folder: Path) -> None:
    """Write random bf16 weights of a catalog shape, with the bundled tokenizer, so that `load` reads real files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qwen_vram.arithmetic.catalog import catalog_row
    from qwen_vram.demo import CHECKPOINT

    row = catalog_row(model)
    assert row is not None
    shape = {**row.shape._asdict(), "max_position_embeddings": row.max_position_embeddings}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)


def measure(model: str, folder: Path, weights: str) -> Iterator[dict[str, Any]]:
    """One row a workload, in this process: the measured bytes of every part."""
    import torch
    import transformers

    import qwen_vram as qv

    made_on = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    fresh = True
    for case in CASES:
        batch_size, prompt_len, new = case.workloads[0]
        largest: dict[str, Any] = {"batch_size": batch_size, "prompt_len": prompt_len, "max_new_tokens": new}
        with qv.load(folder, profile="default", weights=weights, **case.knobs, **largest, progress=False) as llm:
            for batch_size, prompt_len, new in case.workloads:
                # Segments without a block in use go back, as in a process that has run nothing yet.
                gc.collect()
                torch.cuda.empty_cache()
                workload = {"batch_size": batch_size, "prompt_len": prompt_len, "max_new_tokens": new}
                measured = llm.probe(**workload).measured
                tag = {"model": model, "weights": weights, "knobs": case.knobs, **workload, "fresh_process": fresh}
                yield {**tag, "measured": measured, **made_on}
                fresh = False


def _rows_of(model: str, folder: str, weights: str) -> list[str]:
    """The rows of one fresh process, as lines of JSON."""
    command = [sys.executable, "-m", "qwen_vram.tools.accuracy", "--cell", model, folder, weights]
    ended = subprocess.run(command, capture_output=True, text=True)
    rows = [line[4:] for line in ended.stdout.splitlines() if line.startswith("ROW ")]
    print(f"{model} {weights}: {len(rows)} of {sum(len(case.workloads) for case in CASES)} rows", flush=True)
    if ended.returncode:
        print(f"{model} {weights} failed:\n{ended.stderr[-2000:]}", file=sys.stderr, flush=True)
    return rows


def run(folder: Path, models: list[str], weights: list[str], jobs: int) -> None:
    """Measure the grid. Rows and tables in `folder` are replaced after every format; rows of other models stay."""
    rows = [row for row in read_rows(folder) if row["model"] not in models]
    for model in models:
        with tempfile.TemporaryDirectory(prefix="qwen_vram_accuracy_") as checkpoint:
            make = [sys.executable, "-m", "qwen_vram.tools.accuracy", "--make", model, checkpoint]
            subprocess.run(make, check=True, capture_output=True)
            with ThreadPoolExecutor(jobs) as pool:
                for found in pool.map(partial(_rows_of, model, checkpoint), weights):
                    rows += map(json.loads, found)
                    write(folder, rows)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows in `folder`, none where it has no file of them."""
    path = folder / "accuracy.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `accuracy.jsonl` and `accuracy.md`, each at once; what other tools wrote below the mark stays."""
    _replace(folder / "accuracy.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    page = folder / "accuracy.md"
    _, mark, kept = page.read_text().partition(KEPT_FROM) if page.exists() else ("", "", "")
    _replace(page, report(rows) + (f"\n{mark}{kept}" if mark else ""))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qwen_vram.tools.accuracy", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where accuracy.jsonl and accuracy.md go")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of the catalog")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), help="storage formats")
    parser.add_argument("--jobs", type=int, default=1, help="formats at a time; the GPU must hold them together")
    parser.add_argument("--report", action="store_true", help="write the tables of the rows that are there, and stop")
    parser.add_argument("--cell", nargs=3, metavar=("MODEL", "FOLDER", "WEIGHTS"), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.make[0], Path(options.make[1]))
    elif options.cell:
        for row in measure(options.cell[0], Path(options.cell[1]), options.cell[2]):
            print("ROW " + json.dumps(row), flush=True)
    elif options.report:
        write(options.folder, read_rows(options.folder))
    else:
        _check(options)
        run(options.folder, options.models, options.weights, options.jobs)


def _check(options: argparse.Namespace) -> None:
    import torch

    from qwen_vram.arithmetic.catalog import find
    from qwen_vram.arithmetic.storage import storage_format

    for model in options.models:
        find(model)
    for name in options.weights:
        storage_format(name)
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch sees none here")


if __name__ == "__main__":
    main()
