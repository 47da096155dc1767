"""Measure the plans that `load(folder, vram=...)` chooses by itself: their speed and memory, budget by budget.

    python benchmarks/default_plans.py OUT.jsonl                       # Qwen2.5-7B's shape
    python benchmarks/default_plans.py OUT.jsonl --model Qwen2.5-0.5B  # a quick look

Random weights; 2,048 + 256 tokens are planned, and torch's memory fraction makes the GPU a card of the budget's size.
Every cell has a fresh process. Milliseconds a token: the difference of two generations after 512 tokens, of 16 and 144
new ones, over the difference of their lengths. Cells with a `prompt_len` plan and feed that many tokens. Tokens of a
prompt a second: one generation of one token. Seconds to load are those of a checkpoint in the page cache. If layers
stream, the limit is the link's, at its measured rate. Cells that are in OUT.jsonl already are not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from caps import GIB, limit, load_kernels
from cells import ms_per_token, run_missing
from decode import device_rate

import qwen_vram as qv
from qwen_vram.arithmetic.timing.bytes_moved import decode_bytes, link_bytes

PLANNED = {"prompt_len": 2_048, "max_new_tokens": 256}
PROMPT, SHORT, LONG = 512, 16, 144
PARTS = ("weights", "kv_cache", "peak_allocated", "peak_reserved", "process_total")
BUDGETS = (24, 16, 12, 8, 6, 5, 4, 3)
CELLS: list[dict[str, Any]] = [
    *({"vram": f"{budget}GiB"} for budget in BUDGETS),
    {"vram": "8GiB", "prefer": "speed"},
    *({"vram": f"{budget}GiB", "captured": False} for budget in BUDGETS),
    {"vram": "8GiB", "weights": "int4"},
    # Prompts for which the search quantizes the KV cache: in 8 bits, and in 4.
    *(
        {"vram": "6GiB", "prompt_len": prompt, **more}
        for prompt in (32_000, 60_000)
        for more in ({}, {"captured": False})
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Qwen2.5-7B")
    parser.add_argument("--vram", nargs="*", default=[], help="only these budgets, such as 8GiB")
    parser.add_argument("--only", default="", help="only cells with this knob, such as prompt_len")
    options = parser.parse_args()
    cells = [
        {"model": options.model, **cell}
        for cell in CELLS
        if (cell["vram"] in options.vram or not options.vram) and (options.only in cell or not options.only)
    ]
    sys.exit(run_missing(options.out, cells, measure, options.model) > 0)


def measure(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Load as the cell says, and measure."""
    asked = {**PLANNED, **{name: value for name, value in cell.items() if name != "model"}}
    prompt = cell.get("prompt_len", PROMPT)
    rate, link = device_rate(), link_rate()
    plan = qv.plan(folder, **asked)
    load_kernels(plan.profile.weights)
    limit(int(cell["vram"].removesuffix("GiB")) * GIB)
    began = time.perf_counter()
    with qv.load(folder, **asked, progress=False) as llm:
        loading = time.perf_counter() - began
        estimate, measured = llm.plan.estimate, llm.probe().measured
        ms = ms_per_token(lambda new: llm.probe(prompt_len=prompt, max_new_tokens=new), short=SHORT, long=LONG)
        assert estimate.architecture is not None
        shape = (estimate.architecture, estimate.profile, estimate.workload)
        least = 1_000 * max(decode_bytes(*shape) / rate, link_bytes(*shape) / link)
        return {
            "cell": cell,
            "call": llm.plan.call.split(", ", 1)[1],
            "ms_per_token": ms,
            "predicted_ms": llm.plan.times.ms_per_token,
            "limit_ms": least,
            "share_of_limit": least / ms,
            "prefill_tokens_s": prefill_rate(llm, asked["prompt_len"]),
            "loading_s": loading,
            "ready_s": llm.compile_seconds,
            "promised": {
                part: getattr(estimate, part) for part in ("peak_allocated", "peak_reserved", "process_total")
            },
            "measured": measured,
            "device_gb_s": rate / 1e9,
            "link_gb_s": link / 1e9,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": date.today().isoformat(),
        }


def link_rate() -> float:
    """Bytes a second from pinned host memory to the GPU: the best of five copies of 256 MiB."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    del target
    torch.cuda.empty_cache()
    return source.nbytes / min(times[1:])


def prefill_rate(llm: qv.LoadedModel, prompt_len: int) -> float:
    """Tokens of a prompt of the planned length that are fed a second: the best of three, of one if it is long."""
    times = []
    for _ in range(3 if prompt_len == PLANNED["prompt_len"] else 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        llm.probe(max_new_tokens=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return prompt_len / min(times)


if __name__ == "__main__":
    main()
