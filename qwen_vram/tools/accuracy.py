"""Measurement of memory on this machine's GPU, to compare with the predictions.

The command is `python -m qwen_vram.tools.accuracy`. Every run gets a fresh process, because blocks of earlier runs
would keep segments from being returned. The process loads random weights of the published shape and generates from
random tokens, as the estimate counts it. Memory does not depend on the values of weights, except for the outliers of
int8, which differ between trained models. Rows go to `accuracy.jsonl`, and the tables go to `accuracy.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qwen_vram.tools.accuracy_report import KEPT_FROM, report
from qwen_vram.tools.fresh_process import call_each

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen3-4B")
WEIGHTS = ("bf16", "nf4", "fp4", "int8")


class Case(NamedTuple):
    """One set of knobs, and the workloads that it runs: (batch_size, prompt_len, max_new_tokens) each."""

    knobs: dict[str, Any]
    workloads: tuple[tuple[int, int, int], ...]
    weights: tuple[str, ...] = WEIGHTS


_FUSED = {"attention": "fused", "cache": "preallocated"}
_THREE_FORMATS = ("bf16", "nf4", "int8")
_KERNELS = {**_FUSED, "kernels": "fused"}
CASES = (
    Case({"attention": "sdpa"}, ((1, 8192, 16), (4, 1024, 16), (1, 512, 16))),
    Case(_FUSED, ((1, 8192, 16), (4, 1024, 16), (1, 512, 16))),
    Case({**_FUSED, "prefill_chunk_size": 1024, "embeddings": "host"}, ((1, 8192, 16),)),
    Case(
        {**_FUSED, "prefill_chunk_size": 512, "embeddings": "host", "dequantization": "tiled"},
        ((1, 8192, 16), (1, 512, 16)),
    ),
    Case({**_FUSED, "dequantization": "tiled"}, ((1, 8192, 16), (4, 1024, 16), (1, 512, 16)), weights=("nf4",)),
    Case({**_FUSED, "kv_cache": "int8"}, ((1, 8192, 16),)),
    Case({**_FUSED, "kv_device": "host"}, ((1, 8192, 16),)),
    Case(_KERNELS, ((1, 8192, 16), (4, 1024, 16), (1, 512, 16)), weights=_THREE_FORMATS),
    Case({**_KERNELS, "prefill_chunk_size": 1024}, ((1, 8192, 16),), weights=_THREE_FORMATS),
    Case(
        {**_KERNELS, "prefill_chunk_size": 512, "embeddings": "host", "dequantization": "tiled"},
        ((1, 8192, 16), (1, 512, 16)),
        weights=_THREE_FORMATS,
    ),
    Case({"attention": "sdpa", "prefill_chunk_size": 1024}, ((1, 4096, 16),)),
    Case({"attention": "sdpa", "prefill_chunk_size": 512}, ((1, 4000, 512),), weights=("bf16",)),
    Case({"attention": "sdpa", "cache": "static"}, ((1, 4096, 16),)),
    Case({"attention": "eager"}, ((1, 2048, 16),)),
)


def make_checkpoint(model: str, folder: Path) -> None:
    """Write random bf16 weights of a catalog shape, with the bundled tokenizer, so that `load` reads real files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qwen_vram.demo import CHECKPOINT
    from qwen_vram.spec.catalog import catalog_row

    row = catalog_row(model)
    assert row is not None
    shape = {**row.shape._asdict(), "max_position_embeddings": row.max_position_embeddings}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)


class Cell(NamedTuple):
    """One run: a model with its knobs, and its workload."""

    model: str
    weights: str
    knobs: dict[str, Any]
    batch_size: int
    prompt_len: int
    max_new_tokens: int


def cells(model: str, weights: list[str], cache: str | None = None) -> list[Cell]:
    """Return every run of a model, format by format; if `cache` names a kind, only the runs with it."""
    return [
        Cell(model, name, case.knobs, *workload)
        for name in weights
        for case in CASES
        for workload in case.workloads
        if name in case.weights and cache in (None, case.knobs.get("cache", "dynamic"))
    ]


def measure(cell: Cell, folder: str) -> dict[str, Any]:
    """Run a cell in this process, and return its row with the measured bytes of every part."""
    import torch
    import transformers

    import qwen_vram as qv

    work = {name: getattr(cell, name) for name in ("batch_size", "prompt_len", "max_new_tokens")}
    with qv.load(folder, profile="default", weights=cell.weights, **cell.knobs, **work, progress=False) as llm:
        measured = llm.probe().measured
    return {
        **cell._asdict(),
        "measured": measured,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def run(folder: Path, models: list[str], weights: list[str], cache: str | None, jobs: int) -> None:
    """Measure the cells of the grid that are not in `folder` yet; replace the rows and tables there after every run.

    A row of another date counts as missing, and is removed once the new one is there. A grid that broke off continues.
    """
    today = date.today().isoformat()
    for model in models:
        rows = read_rows(folder)
        done = [cell_of(row) for row in rows if row["date"] == today]
        missing = [cell for cell in cells(model, weights, cache) if cell not in done]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(prefix="qwen_vram_accuracy_") as checkpoint:
            for made in call_each(partial(make_checkpoint, folder=Path(checkpoint)), [model]):
                if made.error:
                    raise SystemExit(f"{model} cannot be made:\n{made.error}")
            for number, ended in enumerate(call_each(partial(measure, folder=checkpoint), missing, jobs=jobs), 1):
                print(f"{model}: {number} of {len(missing)} runs", flush=True)
                if ended.error:
                    print(f"{ended.item} failed:\n{ended.error[-2000:]}", file=sys.stderr, flush=True)
                    continue
                rows = [row for row in rows if cell_of(row) != ended.item] + [ended.value]
                write(folder, sorted(rows, key=_place))


def cell_of(row: dict[str, Any]) -> Cell:
    """Return the cell that a row measures."""
    return Cell(*(row[name] for name in Cell._fields))


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """Return the place of a row's model and format in the order of the grid; those of other grids are last."""
    model, weights = row["model"], row["weights"]
    return (
        MODELS.index(model) if model in MODELS else len(MODELS),
        WEIGHTS.index(weights) if weights in WEIGHTS else len(WEIGHTS),
    )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows in `folder`; empty if it has no file of them."""
    path = folder / "accuracy.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `accuracy.jsonl` and `accuracy.md`, each at once; keep what other tools wrote below the mark."""
    _replace(folder / "accuracy.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    page = folder / "accuracy.md"
    _, mark, kept = page.read_text().partition(KEPT_FROM) if page.exists() else ("", "", "")
    _replace(page, report(rows) + (f"\n{mark}{kept}" if mark else ""))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m qwen_vram.tools.accuracy", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where accuracy.jsonl and accuracy.md go")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of the catalog")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), help="storage formats")
    parser.add_argument("--cache", choices=("dynamic", "static", "preallocated"), help="only runs with this cache")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the GPU must hold them together")
    parser.add_argument("--report", action="store_true", help="write the tables of the rows that are there, and stop")
    options = parser.parse_args()
    if options.report:
        write(options.folder, read_rows(options.folder))
    else:
        _check(options)
        run(options.folder, options.models, options.weights, options.cache, options.jobs)


def _check(options: argparse.Namespace) -> None:
    import torch

    from qwen_vram.spec.catalog import find
    from qwen_vram.spec.formats import storage_format

    for model in options.models:
        find(model)
    for name in options.weights:
        storage_format(name)
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch sees none here")


if __name__ == "__main__":
    main()
