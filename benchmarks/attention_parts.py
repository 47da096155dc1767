"""A chunk's attention after a long past, on a GPU: flash over all keys, and cuDNN over the past and over the chunk.

    python benchmarks/attention_parts.py OUT.jsonl

The heads of Qwen2.5-7B, batch 1, random values. Milliseconds of one layer, the mean of five calls: `flash` over past
and chunk, `cudnn_past` over the past alone without a mask, `cudnn_newest` and `flash_newest` over the chunk alone,
causal. `build` is the first call of cuDNN at a length, which builds its graph; the process's first one loads the
library too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
QUERIES = (512, 1024, 2048, 4096)
PASTS = (8192, 16384, 28672)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="rows are added to it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    with torch.inference_mode(), options.out.open("a") as file:
        for queries in QUERIES:
            for past in (queries, *PASTS):
                row = {"queries": queries, "past": past, **measure(queries, past)}
                row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
                print(json.dumps({**row, "date": date.today().isoformat()}), file=file, flush=True)
                print(row)


def measure(queries: int, past: int) -> dict[str, float]:
    """Milliseconds of each kernel."""
    query = torch.randn(1, queries, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    keys, values = torch.randn(2, 1, KV_HEADS, past + queries, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    older, newest = (keys[:, :, :past], values[:, :, :past]), (keys[:, :, past:], values[:, :, past:])
    began = time.perf_counter()
    cudnn(query, *older, causal=False)
    torch.cuda.synchronize()
    build = 1_000 * (time.perf_counter() - began)
    return {
        "build": build,
        "flash": milliseconds(lambda: flash(query, keys, values)),
        "cudnn_past": milliseconds(lambda: cudnn(query, *older, causal=False)),
        "cudnn_newest": milliseconds(lambda: cudnn(query, *newest, causal=True)),
        "flash_newest": milliseconds(lambda: flash(query, *newest)),
    }


def milliseconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Of one call, the first apart."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        call()
    torch.cuda.synchronize()
    return 1_000 * (time.perf_counter() - began) / rounds


def flash(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """Causal, aligned at the bottom right."""
    states = [one.transpose(1, 2) for one in (query, key, value)]
    return torch.ops.aten._flash_attention_forward(*states, None, None, query.shape[2], key.shape[2], 0.0, True, False)


def cudnn(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Any:
    """Causal from the top left, or without a mask."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal)


if __name__ == "__main__":
    main()
