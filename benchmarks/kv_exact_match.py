"""Exact match of the bundled checkpoint with its KV cache whole, in int8 and in int4.

    python benchmarks/kv_exact_match.py

Held-out questions of every category on the CPU; only `recall` has prompts longer than the 128 tokens that stay whole.
"""

from __future__ import annotations

import argparse

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import examples

CATEGORIES = ("recall", "table", "code", "math", "chinese")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="questions of each category")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES))
    options = parser.parse_args()
    knobs = {"attention": "fused", "cache": "preallocated", "prompt_len": 1024}
    for kv_cache in options.formats:
        with qv.load(CHECKPOINT, profile="default", device="cpu", kv_cache=kv_cache, progress=False, **knobs) as llm:
            for name in options.categories:
                asked = examples(name, "held_out", seed=7, count=options.count)
                right = sum(llm.chat(one.prompt, max_new_tokens=64, do_sample=False) == one.answer for one in asked)
                print(f"{kv_cache} {name}: {right} of {len(asked)}", flush=True)


if __name__ == "__main__":
    main()
