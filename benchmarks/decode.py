"""Milliseconds of a decode step, beside plain transformers and beside the limit that memory sets, on a GPU.

    python benchmarks/decode.py OUT.jsonl                              # Qwen2.5-7B's shape, every format
    python benchmarks/decode.py OUT.jsonl --formats bf16 --by compiled # some cells
    python benchmarks/decode.py OUT.jsonl --model Qwen2.5-0.5B         # quickly

Random weights, batch 1, 512 tokens of prompt and 128 new ones, greedy; every cell in a fresh process. Milliseconds a
token are the difference of two generations' times over the difference of their lengths, the best of three rounds. The
limit is the bytes of one step over what a copy within the device moves, read plus written, which each cell measures
first. The profile adds up kernels of 16 steps by kind, and what of the time no kernel runs. Cells that are in
OUT.jsonl already are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from caps import read

import qwen_vram as qv
from qwen_vram.arithmetic.timing import decode_bytes
from qwen_vram.tools.accuracy import make_checkpoint
from qwen_vram.tools.fresh_process import call_each

PROMPT, NEW, SHORT = 512, 128, 16
FORMATS = ("bf16", "nf4", "int4", "int8-wo", "fp8")
WAYS = ("compiled", "captured", "uncompiled", "transformers")
# What a kernel's name says of it; the first that is found.
KINDS = {
    "attention": ("flash", "attention", "fmha"),
    "matmul": (
        "gemm",
        "gemv",
        "cutlass",
        "cublas",
        "tinygemm",
        "splitk",
        "matmul",
        "4bit",
        "mm_kernel",
        "ampere_",
        "sm90",
    ),
    "fused": ("triton",),
    "copies": ("memcpy", "memset"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Qwen2.5-7B")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--by", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--head", action="store_true", help="the head in the weights' format too")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    options = parser.parse_args()
    done = read(options.out)
    cells = [
        {"model": options.model, "by": by, "weights": weights, "head": options.head, "prompt_len": options.prompt}
        for weights in options.formats
        for by in options.by
        # Plain transformers has no formats of torch's own operators.
        if by != "transformers" or (weights in ("bf16", "nf4") and not options.head)
    ]
    missing = [cell for cell in cells if json.dumps(cell, sort_keys=True) not in done]
    with tempfile.TemporaryDirectory(prefix="qwen_vram_decode_") as folder:
        if missing:
            for ended in call_each(partial(make_checkpoint, folder=Path(folder)), [options.model]):
                if ended.error:
                    sys.exit(ended.error)
        for ended in call_each(partial(measure, folder), missing):
            if ended.error:
                print(f"{ended.item} failed:\n{ended.error[-3000:]}", file=sys.stderr, flush=True)
                continue
            print(json.dumps(ended.value), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(ended.value) + "\n")


def measure(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("qwen_vram").setLevel(logging.INFO)
    rate = copy_rate()
    found = by_transformers(folder, cell) if cell["by"] == "transformers" else by_us(folder, cell)
    moved = found["step_bytes"]
    limit = 1_000 * moved / rate
    shares = {"copy_gb_s": rate / 1e9, "limit_ms": limit, "share_of_limit": limit / found["ms_per_token"]}
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {"cell": cell, **shares, **found, **versions, "date": date.today().isoformat()}


def copy_rate() -> float:
    """Bytes a second of a copy within the device, read plus written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    del source, target
    torch.cuda.empty_cache()
    return 10 * 2 * 2**30 / (start.elapsed_time(end) / 1_000)


def by_us(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """This library, and what was promised."""
    if cell["by"] == "captured":
        # As on a machine without a compiler.
        import qwen_vram.runtime.decoder as decoder

        decoder.compiler_for = lambda device: None
    compiled = cell["by"] != "uncompiled"
    knobs: dict[str, Any] = {"weights": cell["weights"], "attention": "fused", "cache": "preallocated"}
    if cell["head"]:
        knobs["lm_head"] = cell["weights"]
    work = {"prompt_len": cell["prompt_len"], "max_new_tokens": NEW}
    began = time.perf_counter()
    with qv.load(folder, profile="default", compiled=compiled, progress=False, **knobs, **work) as llm:
        loading = time.perf_counter() - began
        measured = llm.probe().measured
        estimate = llm.report().estimate
        prompt = torch.randint(0, llm.model.config.vocab_size, (1, cell["prompt_len"]), device="cuda")

        def generate(new: int) -> None:
            cache = llm.new_cache(max_length=cell["prompt_len"] + NEW)
            plain(llm.model, prompt, new, past_key_values=cache)

        return {
            "ms_per_token": ms_per_token(generate),
            "loading_s": loading,
            "compile_s": llm.compile_seconds,
            "step_bytes": decode_bytes(estimate.architecture, estimate.profile, estimate.workload),
            "predicted": {part: getattr(estimate, part) for part in measured},
            "measured": measured,
            "profile": profile(generate),
        }


def by_transformers(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Plain transformers: sdpa, a dynamic cache."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if cell["weights"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0}, **options)
    prompt = torch.randint(0, model.config.vocab_size, (1, cell["prompt_len"]), device="cuda")
    estimate = qv.estimate_vram(folder, weights=cell["weights"], prompt_len=cell["prompt_len"], max_new_tokens=NEW)

    def generate(new: int) -> None:
        plain(model, prompt, new)

    generate(SHORT)
    torch.cuda.reset_peak_memory_stats()
    ms = ms_per_token(generate)
    return {
        "ms_per_token": ms,
        "step_bytes": decode_bytes(estimate.architecture, estimate.profile, estimate.workload),
        "predicted": {"peak_allocated": estimate.peak_allocated},
        "measured": {"peak_allocated": torch.cuda.max_memory_allocated()},
        "profile": profile(generate),
    }


def plain(model: Any, prompt: torch.Tensor, new: int, **options: Any) -> None:
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        **options,
    )


def ms_per_token(generate: Callable[[int], None], rounds: int = 3) -> float:
    generate(SHORT)
    best = float("inf")
    for _ in range(rounds):
        times = []
        for new in (SHORT, NEW):
            torch.cuda.synchronize()
            began = time.perf_counter()
            generate(new)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        best = min(best, 1_000 * (times[1] - times[0]) / (NEW - SHORT))
    return best


def profile(generate: Callable[[int], None]) -> dict[str, Any]:
    """Milliseconds a token that kernels of each kind run, how many there are, and the ten that run longest.

    Generations of 2 and of 18 tokens are profiled: what the longer one has more is 16 steps.
    """
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for new, sign in ((2, -1), (18, 1)):
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as found:
            generate(new)
            torch.cuda.synchronize()
        for event in found.key_averages():
            if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total:
                times[event.key] += sign * event.self_device_time_total
                counts[event.key] += sign * event.count
    kinds: Counter[str] = Counter()
    for name, microseconds in times.items():
        kind = next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")
        kinds[kind] += microseconds
    return {
        "kernel_ms": sum(times.values()) / 16 / 1_000,
        "kinds_ms": {kind: total / 16 / 1_000 for kind, total in kinds.most_common()},
        "kernels": sum(counts.values()) / 16,
        "longest": [
            {"name": name[:90], "ms": total / 16 / 1_000, "count": counts[name] / 16}
            for name, total in times.most_common(10)
        ],
    }


if __name__ == "__main__":
    main()
