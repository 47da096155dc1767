"""One model over two GPUs: what each was promised to take beside what it took, as JSON lines.

    python benchmarks/split.py OUT.jsonl [--seconds 500] [--only Qwen2.5-14B]

Both cards are cut down by torch's memory fraction to what is left of their caps once context and kernels are on them;
every plan runs to its last token, or says no before it loads. Every cell has a process of its own, for streams and
kernels of an earlier model stay in a process. `--together` runs all cells of a model in one process instead, whose
later plans count what it holds already. Cells that are in OUT.jsonl already are not run again.
Random weights of the published shapes; Qwen2.5-14B takes 30 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from caps import read

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.runtime.measure import process_bytes
from qwen_vram.tools.accuracy import make_checkpoint
from qwen_vram.tools.fresh_process import call_each

GIB = 2**30
FUSED = {"profile": "default", "attention": "fused", "cache": "preallocated"}
# Model, caps of the two cards in GiB, prompt, batch, knobs; without a profile the planner chooses.
CELLS: tuple[tuple[str, tuple[int, int], int, int, dict[str, Any]], ...] = (
    ("Qwen2.5-14B", (20, 20), 512, 1, {"weights": "bf16"}),
    ("Qwen2.5-14B", (20, 20), 8_000, 1, {"weights": "bf16"}),
    ("Qwen2.5-14B", (20, 20), 32_000, 1, {"weights": "bf16"}),
    ("Qwen2.5-14B", (24, 12), 8_000, 1, {"weights": "bf16"}),
    ("Qwen2.5-14B", (24, 24), 4_000, 1, {"profile": "default"}),
    ("Qwen2.5-14B", (8, 8), 8_000, 1, {}),
    ("Qwen2.5-7B", (12, 12), 8_000, 2, FUSED),
    ("Qwen2.5-7B", (12, 12), 8_000, 2, {**FUSED, "kv_device": "host", "embeddings": "host"}),
    ("Qwen2.5-7B", (6, 6), 32_000, 1, {**FUSED, "weights": "nf4", "kv_cache": "int8", "prefill_chunk_size": 1_024}),
    ("Qwen2.5-7B", (10, 6), 8_000, 1, {**FUSED, "weights": "int8"}),
    ("Qwen2.5-3B", (6, 6), 8_000, 1, {"profile": "default"}),
)
PARTS = ("weights", "kv_cache", "activations", "workspace", "peak_allocated", "peak_reserved", "process_total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="one model")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after this time")
    parser.add_argument("--together", action="store_true", help="all cells of a model in one process")
    options = parser.parse_args()
    done = read(options.out)
    missing = [
        cell for cell in cells() if json.dumps({**cell, "together": options.together}, sort_keys=True) not in done
    ]
    end = time.monotonic() + options.seconds
    for model, group in groupby(missing, key=lambda cell: cell["model"]):
        if options.only not in (None, model) or time.monotonic() > end:
            continue
        with tempfile.TemporaryDirectory(prefix="qwen_vram_split_") as folder:
            list(call_each(partial(make_checkpoint, folder=Path(folder)), [model]))
            every = list(group)
            batches = [every] if options.together else [[cell] for cell in every]
            for ended in call_each(partial(run_cells, folder, end, options.out, options.together), batches):
                if ended.error:
                    print(f"{ended.item} failed:\n{ended.error[-1500:]}", file=sys.stderr, flush=True)


def run_cells(folder: str, end: float, out: Path, together: bool, batch: list[dict[str, Any]]) -> None:
    """Run cells in this process and append their rows to `out`; none is begun past `end`."""
    load_kernels()
    for cell in batch:
        if time.monotonic() > end:
            return
        row = {"cell": {**cell, "together": together}, **hold(folder, cell)}
        row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        row |= {"transformers": transformers.__version__, "date": date.today().isoformat()}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        show(row)


def cells() -> Iterator[dict[str, Any]]:
    for model, caps, prompt, batch, knobs in CELLS:
        work = {"prompt_len": prompt, "max_new_tokens": 64, "batch_size": batch}
        yield {"model": model, "caps": [cap * GIB for cap in caps], **work, "knobs": knobs}


def hold(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Cut the cards down to their caps, plan, load and run a cell; the parts of each GPU."""
    caps = dict(enumerate(cell["caps"]))
    work = {name: cell[name] for name in ("prompt_len", "max_new_tokens", "batch_size")}
    for device, cap in caps.items():
        limit(device, cap)
    began = time.monotonic()
    try:
        with qv.load(folder, vram=caps, **work, **cell["knobs"], progress=False) as llm:
            loaded = time.monotonic()
            report = llm.probe()
            times = {"loading_s": loaded - began, "running_s": time.monotonic() - loaded}
            made = {name: llm.plan.to_dict()[name] for name in ("split", "profile")}
            return {"said": "yes", "ran": True, **times, **made, "devices": report.to_dict()["devices"]}
    except qv.DoesNotFitError as error:
        return {"said": "no", "ran": False, "needs": error.devices}
    except torch.cuda.OutOfMemoryError as error:
        return {"said": "yes", "ran": False, "error": str(error)}
    finally:
        for device in caps:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def load_kernels() -> None:
    """Run the bundled model over both, so that the cards are cut down with the usual kernels on them."""
    both = {0: 8 * GIB, 1: 8 * GIB}
    with qv.load(CHECKPOINT, profile="default", vram=both, prompt_len=1_024, progress=False) as llm:
        llm.probe(max_new_tokens=64)


def limit(device: int, cap: int) -> None:
    """Leave torch what a card of `cap` bytes would, once the context and loaded kernels are on it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.ones(1, device=f"cuda:{device}")
    shown = process_bytes(torch.device("cuda", device))
    assert shown is not None, "the driver does not tell what this process takes"
    beside = shown - torch.cuda.memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - beside) / total), device)


def show(row: dict[str, Any]) -> None:
    """A line for the cell, and one for each GPU with the errors of its parts."""
    print(json.dumps(row["cell"]), {name: row[name] for name in ("said", "ran", "split", "needs") if name in row})
    for device, parts in row.get("devices", {}).items():
        errors = {
            part: f"{parts[part]['predicted'] / parts[part]['measured'] - 1:+.2%}"
            for part in (*PARTS, "load_peak")
            if parts[part]["measured"]
        }
        print(f"  GPU {device}: process {parts['process_total']['measured']}, errors {errors}", flush=True)


if __name__ == "__main__":
    main()
