"""Predicted beside measured memory, on this machine's GPU: `python -m qwen_vram.tools.accuracy`.

Every cell runs in a fresh process: random weights of a published shape are loaded and generated from, and each part
that was measured is held against the estimate. Memory does not depend on the values of weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

MODELS = ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen3-4B")
WEIGHTS = ("bf16", "nf4", "nf4-plain", "fp4", "int8")
KNOBS: tuple[dict[str, Any], ...] = (
    {"attention": "sdpa"},
    {"attention": "fused", "cache": "preallocated"},
    {"attention": "fused", "cache": "preallocated", "prefill_chunk_size": 1024, "embeddings": "host"},
)
WORKLOADS = ((1, 8192, 16), (1, 512, 16), (4, 1024, 16))  # batch_size, prompt_len, max_new_tokens
PARTS = ("weights", "load_peak", "peak_allocated", "peak_reserved", "process_total")


def make_checkpoint(model: str, folder: Path) -> None:
    """Write random bf16 weights of a catalog shape, with the bundled tokenizer, so that `load` reads real files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qwen_vram.arithmetic.catalog import catalog_row
    from qwen_vram.demo import CHECKPOINT

    row = catalog_row(model)
    if row is None:
        raise SystemExit(f"{model} is not in the catalog")
    shape = {**row.shape._asdict(), "max_position_embeddings": row.max_position_embeddings}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)


def measure_cell(model: str, folder: Path, weights: str, knobs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row a workload: every part's predicted and measured bytes, in this process."""
    import torch
    import transformers

    import qwen_vram as qv

    made_on = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    # The longest workload is planned for and runs first, in a process that has reserved nothing yet.
    (batch_size, prompt_len, max_new_tokens), *_ = WORKLOADS
    with qv.load(
        folder,
        profile="default",
        weights=weights,
        batch_size=batch_size,
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        progress=False,
        **knobs,
    ) as llm:
        for order, (batch_size, prompt_len, max_new_tokens) in enumerate(WORKLOADS):
            workload = {"batch_size": batch_size, "prompt_len": prompt_len, "max_new_tokens": max_new_tokens}
            parts = llm.probe(**workload).to_dict()
            tag = {"model": model, "weights": weights, "knobs": knobs, **workload, "fresh_process": order == 0}
            yield {**tag, "parts": parts, **made_on}


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: by weights and part, the mean and extreme errors and the share that was too low."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        for part in PARTS:
            values = row["parts"][part]
            first_only = part in ("peak_reserved", "process_total", "load_peak")
            if values["measured"] and (row["fresh_process"] or not first_only):
                found[row["weights"], part].append(values["predicted"] / values["measured"] - 1)
    lines = ["| weights | part | cells | mean | lowest | highest | too low |", "|---|---|---|---|---|---|---|"]
    for (weights, part), errors in found.items():
        mean, low = sum(errors) / len(errors), sum(error < 0 for error in errors) / len(errors)
        spread = f"{mean:+.2%} | {min(errors):+.2%} | {max(errors):+.2%} | {low:.0%}"
        lines.append(f"| {weights} | `{part}` | {len(errors)} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Run the grid and write one JSON row a cell, then the table."""
    parser = argparse.ArgumentParser(prog="python -m qwen_vram.tools.accuracy", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("accuracy.jsonl"), help="rows are appended here")
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of the catalog")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, help="storage formats")
    parser.add_argument("--cell", nargs=4, metavar=("MODEL", "FOLDER", "WEIGHTS", "KNOBS"), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        return make_checkpoint(options.make[0], Path(options.make[1]))
    if options.cell:
        model, folder, weights, knobs = options.cell
        for row in measure_cell(model, Path(folder), weights, json.loads(knobs)):
            print("ROW " + json.dumps(row), flush=True)
        return None
    this = [sys.executable, "-m", "qwen_vram.tools.accuracy"]
    for model in options.models:
        with tempfile.TemporaryDirectory(prefix="qwen_vram_accuracy_") as folder:
            subprocess.run([*this, "--make", model, folder], check=True)
            for weights in options.weights:
                for knobs in KNOBS:
                    command = [*this, "--cell", model, folder, weights, json.dumps(knobs)]
                    ended = subprocess.run(command, capture_output=True, text=True)
                    rows = [line[4:] for line in ended.stdout.splitlines() if line.startswith("ROW ")]
                    with options.out.open("a") as file:
                        file.writelines(row + "\n" for row in rows)
                    print(f"{model} {weights} {knobs}: {len(rows)} of {len(WORKLOADS)} rows", flush=True)
                    if ended.returncode:
                        print(ended.stderr[-2000:], file=sys.stderr)
    print(summary([json.loads(line) for line in options.out.read_text().splitlines()]))
    return None


if __name__ == "__main__":
    main()
