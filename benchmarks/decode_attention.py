"""Attention of one new token in a captured step: this library's kernels beside torch's flash kernel.

    python benchmarks/decode_attention.py OUT.jsonl        # a minute on an H200

Each figure is of a CUDA graph of 28 calls. The kernels rotate, write into the cache and attend. Beside them are the
rotation, both writes and flash attention, with copies of query and key, because the rotation is in place. A row names
the parts into which keys are divided; `chosen` is what `decode_splits` chooses. Rows with `kv_cache` are over a
quantized cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qwen_vram.arithmetic.attention import decode_scratch, decode_splits
from qwen_vram.runtime.attention import decode_kernels
from qwen_vram.runtime.attention.decode import decode_attention
from qwen_vram.runtime.kernels import fused_ops
from qwen_vram.runtime.kv_cache.arena import KvArena
from qwen_vram.runtime.kv_cache.quantized import QuantizedStates, quantized_states
from qwen_vram.spec.kv_formats import KV_FORMATS

CALLS, REPLAYS = 28, 20
SPLITS = (8, 16, 32, 64)
# Sequences, heads, heads of keys, size of a head, length of the memory, keys of each sequence.
SHAPES = (
    (1, 28, 4, 128, 2_304, 600),
    (1, 28, 4, 128, 2_304, 2_304),
    (1, 28, 4, 128, 32_768, 32_000),
    (8, 28, 4, 128, 2_304, 2_000),
    (1, 14, 2, 64, 2_304, 600),
    (1, 32, 8, 128, 2_304, 600),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="rows are added to it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    common = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": date.today().isoformat()}
    with options.out.open("a") as file, torch.inference_mode():
        for shape in SHAPES:
            for row in (*measured(*shape), *over_codes(*shape)):
                print(json.dumps({**row, **common}), file=file, flush=True)
                print(row)


def measured(batch: int, heads: int, kv_heads: int, head_dim: int, length: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield the row of flash attention, and a row for each number of parts."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    query, key, value = (random(batch, one, head_dim) for one in (heads, kv_heads, kv_heads))
    cos, sin = random(batch, 1, head_dim), random(batch, 1, head_dim)
    keys, values = (random(batch * length, kv_heads, head_dim) for _ in range(2))
    rows = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    starts, filled = rows * length, torch.full((batch,), count, device="cuda", dtype=torch.int32)
    slots, scale = (starts[:-1] + count - 1).long(), head_dim**-0.5

    def flash() -> torch.Tensor:
        turned, new = query.clone()[:, None], key.clone()[:, None]
        fused_ops.rotate(turned, new, cos, sin)
        keys.index_copy_(0, slots, new[:, 0])
        values.index_copy_(0, slots, value)
        result: torch.Tensor = decode_attention(turned[:, 0], keys, values, rows, starts, filled, scale)
        return result

    expected = flash().float()
    about = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "keys": count}
    yield {**about, "kernel": "flash", "us": microseconds(flash)}
    chosen = decode_splits(batch, kv_heads, length)
    for splits in sorted({*SPLITS, chosen}):
        elements = decode_scratch(batch, heads, kv_heads, head_dim, length) // chosen * splits
        scratch = torch.empty(elements, device="cuda")

        def ours(splits: int = splits, scratch: torch.Tensor = scratch) -> torch.Tensor:
            where = {"scale": scale, "splits": splits, "quantized": filled}
            return decode_kernels.attend(query, key, value, cos, sin, keys, values, starts, filled, scratch, **where)

        error = (ours().float() - expected).abs().max().item()
        yield {**about, "kernel": "own", "splits": splits, "chosen": splits == chosen, "us": microseconds(ours)} | {
            "differs_by": error
        }


def over_codes(
    batch: int, heads: int, kv_heads: int, head_dim: int, length: int, count: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each quantized format."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    query, key, value = (random(batch, one, head_dim) for one in (heads, kv_heads, kv_heads))
    cos, sin = random(batch, 1, head_dim), random(batch, 1, head_dim)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * length
    filled = torch.full((batch,), count, device="cuda", dtype=torch.int32)
    splits = decode_splits(batch, kv_heads, length)
    scratch = torch.empty(decode_scratch(batch, heads, kv_heads, head_dim, length), device="cuda")
    for stored in KV_FORMATS.values():
        if not stored.is_quantized:
            continue
        memory = quantized_states(key[:, :, None], length, stored, KvArena(1), query.device)
        old = stored.quantized_tokens(count)
        for states in memory:
            states.codes.write(random(batch, kv_heads, old, head_dim), 0)
            states.newest.copy_(random(*states.newest.shape))
        codes = torch.tensor([old], device="cuda", dtype=torch.int32)

        def ours(memory: tuple[QuantizedStates, QuantizedStates] = memory, codes: torch.Tensor = codes) -> torch.Tensor:
            where = {"scale": head_dim**-0.5, "splits": splits, "quantized": codes}
            return decode_kernels.attend(query, key, value, cos, sin, *memory, starts, filled, scratch, **where)

        about = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "keys": count}
        yield {**about, "kernel": "own", "kv_cache": stored.name, "splits": splits, "us": microseconds(ours)}


def microseconds(call: Callable[[], object]) -> float:
    """Of one call, in a graph of many."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return round(1_000 * start.elapsed_time(end) / REPLAYS / CALLS, 2)


if __name__ == "__main__":
    main()
