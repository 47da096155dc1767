"""Measure 64 mixed requests together and one by one, beside transformers' continuous batching with its defaults.

    python benchmarks/batching.py OUT.jsonl [--model Qwen2.5-7B] [--weights bf16 nf4] [--by together one-by-one ...]

Random weights; the requests have 16 to 1,024 prompt tokens and 64 to 256 new ones, by a fixed seed, and no end token.
`together` is `load(concurrency=64)`, `one-by-one` the same call without `concurrency`. Each cell has a fresh process.
Cells that are in OUT.jsonl already are not run again. All requests run twice, and the second time counts.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from caps import load_kernels
from cells import run_missing

import qwen_vram as qv
from qwen_vram.runtime.measure import process_bytes

REQUESTS = 64
PROMPT, NEW = (16, 1024), (64, 256)
BY = ("together", "one-by-one", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Qwen2.5-7B")
    parser.add_argument("--weights", nargs="*", default=["bf16", "nf4"])
    parser.add_argument("--by", nargs="*", default=list(BY), choices=BY)
    parser.add_argument("--checkpoint", type=Path, help="a folder with the model's shape, instead of a new one")
    options = parser.parse_args()
    cells = [{"model": options.model, "weights": weights, "by": by} for weights in options.weights for by in options.by]
    sys.exit(run_missing(options.out, cells, measure, options.model, checkpoint=options.checkpoint) > 0)


def shapes() -> list[tuple[int, int]]:
    """Prompt and new tokens of each request."""
    rng = random.Random(7)
    return [(rng.randint(*PROMPT), rng.randint(*NEW)) for _ in range(REQUESTS)]


def measure(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Run all requests as the cell says."""
    load_kernels(cell["weights"])
    run = by_transformers if cell["by"] == "transformers" else by_this_library
    return {
        "cell": cell,
        **run(folder, cell),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def timed(run: Callable[[list[list[int]]], int], vocab_size: int) -> dict[str, Any]:
    """Tokens a second of the second of two runs over random prompts."""
    rng = random.Random(11)
    for _ in range(2):
        prompts = [[rng.randrange(vocab_size) for _ in range(prompt)] for prompt, _ in shapes()]
        torch.cuda.synchronize()
        began = time.perf_counter()
        tokens = run(prompts)
        seconds = time.perf_counter() - began
    return {"new_tokens": tokens, "seconds": seconds, "tokens_s": tokens / seconds}


def by_this_library(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Submit all requests to a loaded model."""
    most = max(prompt for prompt, _ in shapes()), max(new for _, new in shapes())
    asked: dict[str, Any] = {"concurrency": REQUESTS} if cell["by"] == "together" else {}
    with qv.load(
        folder, weights=cell["weights"], prompt_len=most[0], max_new_tokens=most[1], progress=False, **asked
    ) as llm:
        llm.model.generation_config.eos_token_id = None
        made = llm._generations

        def run(prompts: list[list[int]]) -> int:
            jobs = []
            for ids, (_, new) in zip(prompts, shapes(), strict=True):
                tokens = torch.tensor([ids])
                inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                jobs.append(made.job(lambda: llm.model, inputs, new, {"do_sample": False}))
            if cell["by"] == "together":
                for job in jobs:
                    job.start()
                return sum(job.result().shape[1] for job in jobs) - sum(map(len, prompts))
            count = 0
            for job, ids in zip(jobs, prompts, strict=True):
                job.start()
                count += job.result().shape[1] - len(ids)
            return count

        found = timed(run, llm.model.config.vocab_size)
        estimate = llm.plan.estimate
        parts = ("kv_cache", "peak_allocated", "peak_reserved", "process_total")
        return {
            **found,
            "call": llm.plan.call.split(", ", 1)[1],
            "ready_s": llm.compile_seconds,
            "promised": {part: getattr(estimate, part) for part in parts},
            "measured": {**llm.report().measured, "process_total": process_bytes(llm.device)},
        }


def by_transformers(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Give all requests to transformers' manager, with its defaults."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=quantized if cell["weights"] == "nf4" else None,
    )
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=NEW[1])
    torch.cuda.reset_peak_memory_stats()
    with model.continuous_batching_context_manager(generation_config=settings) as manager:

        def run(prompts: list[list[int]]) -> int:
            for ids, (_, new) in zip(prompts, shapes(), strict=True):
                manager.add_request(ids, max_new_tokens=new)
            results: list[Any] = []
            while len(results) < len(prompts):
                one = manager.get_result(timeout=60)
                if one is None or one.error:
                    raise RuntimeError(f"no result: {getattr(one, 'error', 'timeout')}")
                results.append(one)
            return sum(len(one.generated_tokens) for one in results)

        found = timed(run, model.config.vocab_size)
        return {**found, "measured": {"peak_allocated": torch.cuda.max_memory_allocated()}}


if __name__ == "__main__":
    main()
