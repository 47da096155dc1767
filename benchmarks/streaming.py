"""Streamed layers beside the link's limit and beside accelerate, on a GPU; and long prompts on very small cards.

    python benchmarks/streaming.py speed OUT.jsonl    # 512-token prompt: ours, accelerate on the same maps, resident
    python benchmarks/streaming.py host OUT.jsonl     # all layers on the host, and some of them computed by the CPU
    python benchmarks/streaming.py disk OUT.jsonl     # the same with layers on the disk, and in the page cache
    python benchmarks/streaming.py caps OUT.jsonl     # 32,000 tokens under 4, 3 and 2 GiB, planned by profile="auto"

Qwen2.5-7B's shape, random weights; every cell in a fresh process, one after another. `speed`: milliseconds a token are
the difference of two generations' times over the difference of their lengths, the second of two rounds; the link's
limit is bytes streamed a token over the rate of pinned copies, which each cell measures first; `host` measures the rate
of the CPU's products too. `caps`: the time from
the end of the prefill to the end of the last decode step, over the steps, by the device's own clock, so that the host
waits for nothing that a generation does not wait for. Cells that are in OUT.jsonl already are not run again. `disk`:
checkpoints are in TMPDIR, whose disk is measured; before each step of a cell with "cold", the system is told to drop
the files from its page cache, while two layers may be read ahead. NF4 layers are read from a quantized copy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from caps import limit, load_kernels
from cells import ms_per_token, run_missing

import qwen_vram as qv
from qwen_vram.arithmetic.timing.bytes_moved import decode_floor_ms, link_bytes
from qwen_vram.tools.disk_rate import disk_read_rate
from qwen_vram.tools.product_rates import packed_product_rate, plain_product_rate

MODEL = "Qwen2.5-7B"
GIB = 2**30
PROMPT = 512
SPEED = [
    {"by": by, "weights": weights, "streamed_layers": layers}
    for weights, layers in (("bf16", 3), ("bf16", 28), ("nf4", 3), ("nf4", 28))
    for by in ("ours", "accelerate")
]
SPEED += [{"by": "ours", "weights": weights, "streamed_layers": 0} for weights in ("bf16", "nf4")]
HOST = [
    {"by": "ours", "weights": weights, "streamed_layers": 28, "host_layers": layers}
    for weights in ("nf4", "bf16")
    for layers in (0, 10, 16, 22, 28)
]
DISK = [
    {"by": "ours", "weights": weights, "streamed_layers": 28, "disk_layers": layers, "cold": cold}
    for weights in ("bf16", "nf4")
    for layers, cold in ((0, False), (28, False), (28, True))
]
CAPS = [{"cap": cap * GIB, "prompt_len": 32_000, "max_new_tokens": 64} for cap in (4, 3, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "host", "disk", "caps"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MODEL)
    options = parser.parse_args()
    every = {"speed": SPEED, "host": HOST, "disk": DISK, "caps": CAPS}[options.what]
    cells = [{"model": options.model, **cell} for cell in every]
    sys.exit(run_missing(options.out, cells, partial(measure, options.what), options.model) > 0)


def measure(what: str, folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    if what == "caps":
        found = capped(folder, cell)
    elif what == "disk":
        found = {"pinned_gb_s": pinned_rate(), **from_disk(Path(folder), cell)}
    elif cell["by"] == "accelerate":
        found = {"pinned_gb_s": pinned_rate(), **by_accelerate(folder, cell)}
    else:
        found = {"pinned_gb_s": pinned_rate(), **by_us(folder, cell)}
    if what == "host":
        product_rate = {"bf16": plain_product_rate, "nf4": packed_product_rate}[cell["weights"]](2 * GIB)
        found |= {"product_gb_s": (product_rate or 0) / 1e9, "threads": torch.get_num_threads()}
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {"cell": cell, **found, **versions, "date": date.today().isoformat()}


def pinned_rate() -> float:
    """GB/s of copies from pinned memory, as they stream: pieces of 466 MB."""
    host = torch.empty(466_000_000, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 10 * host.nbytes / 1e9 / (time.perf_counter() - began)


def by_us(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """This library's streamed layers, and what was promised of them."""
    work = {"prompt_len": PROMPT, "max_new_tokens": 34}
    knobs = {knob: cell[knob] for knob in ("weights", "streamed_layers", "host_layers") if knob in cell}
    settings = {**knobs, "attention": "fused", "cache": "preallocated", "profile": "default", "progress": False}
    began = time.perf_counter()
    with qv.load(folder, vram=1_000 * GIB, **settings, **work) as llm:
        loading = time.perf_counter() - began
        estimate = llm.plan.estimate
        ms = ms_per_token(lambda new: llm.probe(prompt_len=PROMPT, max_new_tokens=new), short=2, long=34)
        measured = llm.report().measured
        return {
            "ms_per_token": ms,
            "floor_ms": decode_floor_ms(estimate.architecture, estimate.profile, estimate.workload, estimate.machine),
            "link_bytes": link_bytes(estimate.architecture, estimate.profile, estimate.workload),
            "loading_s": loading,
            "predicted_peak": estimate.peak_allocated,
            **measured,
        }


def from_disk(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of decode steps with layers on the disk, each step alone, and the disk's own rate."""
    work = {"prompt_len": PROMPT, "max_new_tokens": 10}
    if cell["weights"] == "nf4":
        folder = quantized(folder)
    layers = {name: cell[name] for name in ("streamed_layers", "disk_layers")}
    settings = {**layers, "attention": "fused", "cache": "preallocated", "profile": "default", "progress": False}
    row: dict[str, Any] = {"disk_gb_s": (disk_read_rate(folder.parent, 2**31) or 0) / 1e9}
    steps: list[float] = []
    began = 0.0

    def step(*_: object) -> None:
        nonlocal began
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - began)
        if cell["cold"]:
            drop(folder)
        began = time.perf_counter()

    with qv.load(folder, vram=1_000 * GIB, ram=1_000 * GIB, **settings, **work) as llm:
        estimate = llm.plan.estimate
        llm.probe()
        hook = llm.model.register_forward_hook(step)
        measured = llm.probe().measured
        hook.remove()
        row["ms_per_token"] = 1_000 * statistics.median(steps[1:])  # the first is the prefill
        row |= {"disk_bytes": estimate.disk, "host": estimate.host}
        row |= {
            "floor_ms": decode_floor_ms(estimate.architecture, estimate.profile, estimate.workload, estimate.machine)
        }
        return {**row, "predicted_peak": estimate.peak_allocated, **measured}


def quantized(folder: Path) -> Path:
    """The checkpoint's NF4 copy beside it, made where it is not there."""
    out = folder / "nf4"
    if not out.exists():
        with qv.load(folder, profile="default", weights="nf4", prompt_len=1, max_new_tokens=1, progress=False) as llm:
            llm.save_quantized(out, progress=False)
    return out


def drop(folder: Path) -> None:
    """Have the system drop the checkpoint's files from its page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def by_accelerate(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """The same map, run by the hooks that `transformers` puts on it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    where = qv.offload_map(MODEL, layers_on_cpu=cell["streamed_layers"])
    options: dict[str, Any] = {}
    if cell["weights"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=where, **options)
    except ValueError as error:
        return {"refused": str(error).strip()[:200]}
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device="cuda")

    def generate(new: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    torch.cuda.reset_peak_memory_stats()
    ms = ms_per_token(generate, short=2, long=2 + (8 if cell["streamed_layers"] < 10 else 3), rounds=1)
    return {"ms_per_token": ms, "peak_allocated": torch.cuda.max_memory_allocated()}


def capped(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Plan for a small card, cut this one down to it, load what was planned and run it to the last token."""
    work = {name: cell[name] for name in ("prompt_len", "max_new_tokens")}
    plan = qv.plan(folder, vram=cell["cap"], **work)
    profile = plan.profile
    row: dict[str, Any] = {"call": plan.call, "needed": plan.estimate.needed_bytes}
    row |= {"predicted_ms": plan.steps[-1].decode_floor_ms, "predicted_peak": plan.estimate.peak_allocated}
    load_kernels(profile.weights)
    limit(cell["cap"])
    with qv.load(folder, profile=profile, vram=1_000 * GIB, **work, progress=False) as llm:
        ends: list[Any] = []

        def end(*_: object) -> None:
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()

        hook = llm.model.register_forward_hook(end)
        began = time.perf_counter()
        measured = llm.probe().measured
        torch.cuda.synchronize()
        whole = 1_000 * (time.perf_counter() - began)
        hook.remove()
        steps = work["max_new_tokens"] - 1  # the first token is the prefill's
        decoding = ends[-steps - 1].elapsed_time(ends[-1])
        row["prefill_s"] = (whole - decoding) / 1_000
        row["ms_per_token"] = decoding / steps
        return {**row, **measured}


if __name__ == "__main__":
    main()
