"""Milliseconds a token and of a prefill on the CPU, with the rates of products in the same process.

    python benchmarks/cpu_times.py OUT.jsonl                       # Qwen2.5-0.5B's shape; some 5 minutes on 2 cores

Random weights, a prompt of 512 tokens, batch 1; every cell in a fresh process, one after another. Milliseconds a token
are the difference of two generations' times, of 2 and of 18 tokens, over the difference of their lengths; the prefill
is a generation of one token. Rates are measured before each of four rounds. Of all the fastest is kept, for other
processes may run. Cells that are in OUT.jsonl already are not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cells import ms_per_token, run_missing

import qwen_vram as qv
from qwen_vram.tools.product_rates import many_rows_rate, packed_product_rate, plain_product_rate

PROMPT, SHORT, LONG, ROUNDS = 512, 2, 18, 4
CELLS: list[dict[str, Any]] = [{"weights": "bf16"}, {"weights": "nf4"}, {"weights": "int4"}, {"weights": "int8-wo"}]
KNOBS = {"attention": "fused", "kernels": "fused", "cache": "preallocated"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Qwen2.5-0.5B")
    options = parser.parse_args()
    cells = [{"model": options.model, "prompt_len": PROMPT, **KNOBS, **cell} for cell in CELLS]
    sys.exit(run_missing(options.out, cells, measure, options.model) > 0)


def measure(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    knobs = {name: value for name, value in cell.items() if name not in ("model", "prompt_len")}
    work = {"prompt_len": PROMPT, "max_new_tokens": LONG}
    every: list[dict[str, Any]] = []
    with qv.load(folder, profile="default", device="cpu", **knobs, **work, progress=False) as llm:
        for _ in range(ROUNDS):
            rates = {
                "host_product_rate": plain_product_rate(2**29),
                "host_4bit_rate": packed_product_rate(2**29),
                "host_matmul_rate": many_rows_rate(),
            }
            began = time.perf_counter()
            llm.probe(max_new_tokens=1)
            prefill = time.perf_counter() - began
            ms = ms_per_token(lambda new: llm.probe(max_new_tokens=new), short=SHORT, long=LONG, rounds=1)
            every.append({"ms_per_token": ms, "prefill_s": prefill, **rates})
    found = {name: min(one[name] for one in every) for name in ("ms_per_token", "prefill_s")}
    found |= {name: max((one[name] for one in every if one[name] is not None), default=None) for name in rates}
    versions = {"device": "CPU", "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"cell": cell, **found, **versions, "date": date.today().isoformat()}


if __name__ == "__main__":
    main()
