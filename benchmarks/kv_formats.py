"""What each KV cache costs: time of prefill and decode, bytes, and the error of the logits.

    python benchmarks/kv_formats.py OUT.jsonl                          # Qwen2.5-7B's shape, random weights, on a GPU
    python benchmarks/kv_formats.py OUT.jsonl --checkpoint FOLDER --prompts 300 --new 8        # a checkpoint, anywhere

The cache in the model's own dtype, in int8 and in int4 on the device, and in host memory, each at every prompt length;
every cell in a fresh process, one after another. Times are the second of two generations': of the prefill, in one
piece, and of a decode step, the mean. Errors are |logits - logits of the whole cache| / |those| of the last position:
after a prefill in pieces of 128 tokens, which read what was quantized before, and after `--new` more tokens, the same
for both. Random weights attend to all tokens alike; what trained ones do with quantized keys is
`kv_exact_match.py`'s question. Cells that are in OUT.jsonl already are not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cells import run_missing
from torch import Tensor
from transformers import Cache

import qwen_vram as qv
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache
from qwen_vram.runtime.loaded_model import LoadedModel

CACHES: tuple[dict[str, str], ...] = (
    {"kv_cache": "bf16"},
    {"kv_cache": "int8"},
    {"kv_cache": "int4"},
    {"kv_device": "host"},
)
PIECE = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Qwen2.5-7B", help="a catalog name, whose shape gets random weights")
    parser.add_argument("--checkpoint", type=Path, help="a folder to load instead")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 8_000])
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    options = parser.parse_args()
    if options.checkpoint is None and not torch.cuda.is_available():
        parser.error(f"{options.model} wants a GPU, and torch sees none here; pass --checkpoint with a small one")
    if options.new < 2 or min(options.prompts) < 1:
        parser.error("a decode step needs --new of 2 or more, and a prompt a token")
    cells = [
        {
            "model": str(options.checkpoint or options.model),
            "prompt_len": prompt,
            "max_new_tokens": options.new,
            **cache,
        }
        for prompt in options.prompts
        for cache in CACHES
    ]
    checkpoint = options.checkpoint
    return int(run_missing(options.out, cells, measure, options.model, checkpoint=checkpoint) > 0)


def measure(folder: str, cell: dict[str, Any]) -> dict[str, Any]:
    work = {name: cell[name] for name in ("prompt_len", "max_new_tokens")}
    cache = {name: cell[name] for name in ("kv_cache", "kv_device") if name in cell}
    knobs = {"weights": "bf16", "attention": "fused", "cache": "preallocated", **cache}
    with qv.load(folder, profile="default", **knobs, **work, progress=False) as llm:
        found = times(llm, cell["max_new_tokens"])
        measured = llm.report().measured
        found |= {name: measured[name] for name in ("kv_cache", "peak_allocated") if name in measured}
        found |= errors(llm, **work)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"cell": cell, **found, "device": device, "torch": torch.__version__, "date": date.today().isoformat()}


def times(llm: LoadedModel, new: int) -> dict[str, float]:
    """Seconds of the prefill and milliseconds of a decode step, of the second of two generations."""
    starts: list[float] = []
    ends: list[float] = []
    hooks = [
        llm.model.register_forward_pre_hook(lambda *_: starts.append(now())),
        llm.model.register_forward_hook(lambda *_: ends.append(now())),
    ]
    for _ in range(2):
        starts.clear()
        ends.clear()
        llm.probe()
    for hook in hooks:
        hook.remove()
    assert len(ends) == new
    return {"prefill_s": ends[0] - starts[0], "ms_per_token": 1_000 * (ends[-1] - ends[0]) / (new - 1)}


def now() -> float:
    """The time when everything asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def errors(llm: LoadedModel, prompt_len: int, max_new_tokens: int) -> dict[str, float]:
    """Relative errors of the logits after the prompt and after the last of the new tokens."""
    length, config = prompt_len + max_new_tokens, llm.model.config
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    whole = PreallocatedCache(config.num_hidden_layers, max_length=length)
    expected = fed(llm, tokens, prompt_len, whole)
    got = fed(llm, tokens, prompt_len, llm.new_cache(max_length=length))
    prefill, *_, last = (float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
    return {"error_after_prefill": prefill, "error_after_decode": last}


def fed(llm: LoadedModel, tokens: Tensor, prompt_len: int, cache: Cache) -> Iterator[Tensor]:
    """The last position's logits after the prompt, and after each token that follows it."""
    ends = [*range(PIECE, prompt_len, PIECE), *range(prompt_len, tokens.shape[1] + 1)]
    start = 0
    for end in ends:
        piece = tokens[:, start:end].to(llm.device)
        logits = llm.model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if end >= prompt_len:
            yield logits[0, -1].float()
        start = end


if __name__ == "__main__":
    sys.exit(main())
