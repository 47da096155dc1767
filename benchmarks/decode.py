"""Decoding one token at a time on a GPU: plain transformers, this library, and its compiled steps.

    python benchmarks/decode.py OUT.jsonl                       # Qwen2.5-7B's shape; some 5 minutes on an H100
    python benchmarks/decode.py OUT.jsonl --model Qwen2.5-0.5B  # a quick look

Random weights, a 512-token prompt, batch 1; every cell in a fresh process, one after another. Milliseconds a token are
the difference of two generations' times, of 16 and of 144 tokens, over the difference of their lengths, the second of
two rounds. The limit is the bytes that a step reads over the rate of copies within the device's memory, which each cell
measures. `busy_ms` are the milliseconds of a step in which a kernel of each kind runs, by torch's profiler. Cells that
are in OUT.jsonl already are not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import ms_per_token, run_missing
from streaming import GIB

import qwen_vram as qv
from qwen_vram.arithmetic.timing.bytes_moved import decode_bytes

PROMPT, SHORT, LONG = 512, 16, 144
FUSED = {"attention": "fused", "cache": "preallocated"}
INT4 = {"weights": "int4", "lm_head": "int4"}
CELLS: list[dict[str, Any]] = [
    {"by": "compiled", "weights": "bf16", **FUSED, "compiled": True},
    {"by": "compiled", "weights": "nf4", **FUSED, "compiled": True},
    {"by": "compiled", **INT4, **FUSED, "compiled": True},
    {"by": "transformers", "weights": "bf16"},
    {"by": "transformers", "weights": "nf4"},
    {"by": "uncompiled", "weights": "bf16", **FUSED},
    {"by": "uncompiled", "weights": "nf4", **FUSED},
    {"by": "uncompiled", **INT4, **FUSED},
]
# What a kernel does, by a part of its name; the first that fits.
KINDS = {
    "attention": ("flash",),
    "products": ("gemm", "gemv", "cutlass", "4bit", "int4", "nvjet", "splitk", "tinygemm"),
    "dequantization": ("dequant", "quantize"),
    "fused": ("triton",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Qwen2.5-7B")
    parser.add_argument("--by", nargs="+", default=["compiled", "transformers", "uncompiled"])
    options = parser.parse_args()
    cells = [{"model": options.model, **cell} for cell in CELLS if cell["by"] in options.by]
    sys.exit(run_missing(options.out, cells, measure, options.model) > 0)


def measure(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    rate = device_rate()
    found = by_transformers(folder, cell) if cell["by"] == "transformers" else by_us(folder, cell)
    knobs = {name: value for name, value in cell.items() if name not in ("model", "by")}
    estimate = qv.estimate_vram(cell["model"], profile="default", prompt_len=PROMPT, max_new_tokens=LONG, **knobs)
    limit = 1_000 * decode_bytes(estimate.architecture, estimate.profile, estimate.workload) / rate
    return {
        "cell": cell,
        **found,
        "device_gb_s": rate / 1e9,
        "limit_ms": limit,
        "share_of_limit": limit / found["ms_per_token"],
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def device_rate() -> float:
    """Bytes read and written a second by copies of 2 GiB within the device's memory."""
    one = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    other.copy_(one)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        other.copy_(one)
    torch.cuda.synchronize()
    rate = 20 * one.nbytes / (time.perf_counter() - began)
    del one, other
    torch.cuda.empty_cache()
    return rate


def by_us(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """This library, and what was promised of its memory."""
    knobs = {name: value for name, value in cell.items() if name not in ("model", "by")}
    work = {"prompt_len": PROMPT, "max_new_tokens": LONG}
    began = time.perf_counter()
    with qv.load(folder, profile="default", vram=1_000 * GIB, **knobs, **work, progress=False) as llm:
        loading = time.perf_counter() - began
        estimate, measured = llm.plan.estimate, llm.probe().measured
        ms = ms_per_token(lambda new: llm.probe(max_new_tokens=new), short=SHORT, long=LONG)
        return {
            "ms_per_token": ms,
            "loading_s": loading,
            "compiling_s": llm.compile_seconds,
            "busy_ms": busy(lambda new: llm.probe(max_new_tokens=new)),
            "predicted_peak": estimate.peak_allocated,
            "predicted_reserved": estimate.peak_reserved,
            "predicted_process": estimate.process_total,
            **measured,
        }


def by_transformers(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Plain `transformers`: sdpa and the cache that `generate` makes."""
    options: dict[str, Any] = {}
    if cell["weights"] == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    began = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0}, **options
    )
    loading = time.perf_counter() - began
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device="cuda")
    mask = torch.ones_like(ids)

    def generate(new: int) -> None:
        model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    ms = ms_per_token(generate, short=SHORT, long=LONG)
    return {"ms_per_token": ms, "loading_s": loading, "busy_ms": busy(generate)}


def busy(generate: Any) -> dict[str, float]:
    """Milliseconds of kernels in a decode step, by kind: the difference of generations of 16 and 48 tokens."""
    found = []
    for new in (SHORT, SHORT + 32):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            generate(new)
            torch.cuda.synchronize()
        kinds: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            name = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
            kinds[kind] += event.device_time_total / 1_000
        found.append(kinds)
    return {kind: (found[1][kind] - found[0][kind]) / 32 for kind in sorted(found[1])}


if __name__ == "__main__":
    main()
