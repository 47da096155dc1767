"""Plans held on small cards: a GPU cut down by torch's memory fraction, then loaded and run as planned.

    python benchmarks/caps.py grid OUT.jsonl          # Qwen2.5-7B, 24 to 4 GiB, prompts of 512 to 32,000 tokens
    python benchmarks/caps.py random OUT.jsonl        # 200 seeded workloads of small models
    python benchmarks/caps.py chunks OUT.jsonl        # reserved beside allocated, and prefill beside plain transformers

A card "of 8 GiB" holds all that nvidia-smi would show: what the process takes beside torch's memory, kernels loaded, is
measured and taken off. After a yes the plan runs to its last token; after a no the smallest profile is loaded all the
same, to see whether the no was too cautious. Every cell has a process of its own. Cells that are in OUT.jsonl already
are not run again. Random weights of the published shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.runtime.measure import process_bytes
from qwen_vram.tools.accuracy import make_checkpoint
from qwen_vram.tools.fresh_process import call_each

GIB = 2**30
CAPS = (4, 6, 8, 12, 16, 24)
PROMPTS = (32_000, 8_000, 512)
ROOMY = 1_000 * GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "random", "chunks"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200, help="random workloads")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; the GPU must hold them together")
    options = parser.parse_args()
    done = read(options.out)
    every = {"grid": grid, "random": lambda: random_cells(options.count), "chunks": chunks}[options.what]()
    missing = [cell for cell in every if json.dumps(cell, sort_keys=True) not in done]
    measure = measure_chunk if options.what == "chunks" else hold
    end = time.monotonic() + options.seconds
    for model, group in groupby(missing, key=lambda cell: cell["model"]):
        with tempfile.TemporaryDirectory(prefix="qwen_vram_caps_") as folder:
            list(call_each(partial(make_checkpoint, folder=Path(folder)), [model]))
            for ended in call_each(partial(run_cell, measure, folder, end), group, jobs=options.jobs):
                if ended.error:
                    print(f"{ended.item} failed:\n{ended.error[-1500:]}", file=sys.stderr, flush=True)
                elif ended.value:
                    print(json.dumps(ended.value), flush=True)
                    with options.out.open("a") as file:
                        file.write(json.dumps(ended.value) + "\n")
    summary(options.out)


def run_cell(
    measure: Callable[[str, dict[str, Any]], dict[str, Any]], folder: str, end: float, cell: dict[str, Any]
) -> dict[str, Any] | None:
    """A cell's row, measured in this process; `None` past `end`."""
    if time.monotonic() > end:
        return None
    row = {"cell": cell, **measure(folder, cell), "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {**row, "date": date.today().isoformat()}


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Rows that are there, by their cell."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {json.dumps(row["cell"], sort_keys=True): row for row in rows}


def grid() -> Iterator[dict[str, Any]]:
    for cap in CAPS:
        for prompt in PROMPTS:
            work = {"prompt_len": prompt, "max_new_tokens": 64, "batch_size": 1}
            yield {"model": "Qwen2.5-7B", "cap": cap * GIB, **work, "knobs": {}}
    article = {"prompt_len": 512, "max_new_tokens": 512, "batch_size": 1}
    yield {"model": "Qwen2.5-7B", "cap": ROOMY, **article, "knobs": {"profile": "compact"}}


def random_cells(count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(4)
    choices: dict[str, tuple[object, ...]] = {
        "weights": ("bf16", "int8", "nf4", "fp4"),
        "attention": ("fused", "sdpa", "eager"),
        "prefill_chunk_size": (256, 512, 2_048),
        "embeddings": ("device", "host"),
        "kv_cache": ("bf16", "int8", "int4"),
    }
    cells = []
    for _ in range(count):
        model = rng.choice(("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen3-1.7B"))
        knobs = {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.3}
        work = {"prompt_len": int(16 * 1_500 ** rng.random()), "max_new_tokens": rng.randint(2, 24)}
        batch, cap = rng.choice((1, 1, 2, 4, 8)), int(rng.uniform(1.2, 8) * GIB)
        cells.append({"model": model, "cap": cap, **work, "batch_size": batch, "knobs": knobs})
    yield from sorted(cells, key=lambda cell: str(cell["model"]))


def hold(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Plan a cell, cut the card down to its cap, and run what was planned, or after a no the smallest profile."""
    work = {name: cell[name] for name in ("prompt_len", "max_new_tokens", "batch_size")}
    profile, knobs = cell["knobs"].get("profile", "auto"), {k: v for k, v in cell["knobs"].items() if k != "profile"}
    try:
        plan = qv.plan(folder, profile=profile, vram=cell["cap"], **work, **knobs)
        said, chosen, predicted = "yes", plan.profile, plan.estimate
    except qv.DoesNotFitError as error:
        said, chosen, predicted = "no", error.estimate.profile, error.estimate
    shown = {knob: getattr(chosen, knob) for knob in ("weights", "lm_head", "embeddings", "kv_cache", "kv_device")}
    shown["prefill_chunk_size"] = chosen.prefill_chunk_size
    row = {"said": said, "profile": shown, "needed": predicted.needed_bytes, "predicted": predicted.process_total}
    load_kernels(chosen.weights)
    limit(cell["cap"])
    began = time.monotonic()
    try:
        with qv.load(folder, profile=chosen, vram=ROOMY, **work, progress=False) as llm:
            loaded = time.monotonic()
            measured = llm.probe().measured
            row |= {"ran": True, "loading_s": loaded - began, "running_s": time.monotonic() - loaded, **measured}
    except torch.cuda.OutOfMemoryError:
        row["ran"] = False
    except qv.QwenVramError as error:
        row |= {"ran": False, "refused": str(error)}
    return row


def load_kernels(weights: str) -> None:
    """Run the bundled model in a format, so that its kernels are on the card before that is cut down."""
    with qv.load(CHECKPOINT, profile="default", weights=weights, prompt_len=1_024, progress=False) as llm:
        llm.probe(max_new_tokens=64)


def limit(cap: int) -> None:
    """Leave torch what a card of `cap` bytes would, once the context and loaded kernels are on it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.ones(1, device="cuda")
    shown = process_bytes(torch.device("cuda", 0))
    assert shown is not None, "the driver does not tell what this process takes"
    beside = shown - torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - beside) / total))


def chunks() -> Iterator[dict[str, Any]]:
    ours = {"attention": "fused", "kernels": "fused", "cache": "preallocated", "weights": "bf16"}
    plain = {"attention": "sdpa", "cache": "dynamic", "weights": "bf16"}
    for knobs in (ours, plain):
        for chunk in (4_096, 2_048, 1_024, 512):
            yield {"model": "Qwen2.5-7B", "knobs": {**knobs, "prefill_chunk_size": chunk}, "prompt_len": 32_000}


def measure_chunk(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Peaks of a 32,000-token prompt, and the seconds of its prefill and one step more, each the median of three.

    Of lengths that are new to the process, each 96 tokens longer than the one before, as users' prompts are; and of the
    same length again, for which cuDNN has its graphs.
    """
    longest = cell["prompt_len"]
    work = {"prompt_len": longest, "max_new_tokens": 2, "batch_size": 1}
    with qv.load(folder, profile="default", vram=ROOMY, **cell["knobs"], **work, progress=False) as llm:
        llm.probe(prompt_len=longest - 3 * 96)
        times = []
        for prompt_len in (longest - 2 * 96, longest - 96, longest, longest, longest, longest):
            began = time.monotonic()
            measured = llm.probe(prompt_len=prompt_len).measured
            times.append(time.monotonic() - began)
        return {"new_prefill_s": median(times[:3]), "prefill_s": median(times[3:]), **measured}


def summary(out: Path) -> None:
    """What the rows say together. A forced run that took more than the cap by nvidia-smi does not prove a no wrong."""
    rows = [row for row in read(out).values() if "said" in row]
    yes, no = [r for r in rows if r["said"] == "yes"], [r for r in rows if r["said"] == "no"]
    failed = [r for r in yes if not r["ran"]]
    cautious = [r for r in no if r["ran"] and r["process_total"] <= r["cell"]["cap"]]
    print(f"{len(yes)} yes, {len(failed)} of them out of memory; {len(no)} no, {len(cautious)} of them ran when forced")


if __name__ == "__main__":
    main()
