"""Products of 2 to 64 rows with 4-bit matrices of Qwen2.5-7B on a GPU: which division among warps is fastest.

    python benchmarks/many_rows.py OUT.jsonl    # a minute on an H200, of which half compiles

Each figure is of a CUDA graph of many launches, over so many matrices that the L2 cache holds none of them. A division
whose product is wrong is printed and left out. `us` has microseconds by division: warps of a program with different
rows, and groups of warps with different columns. `fragments_us` is the time of x in the kernel's order.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from qwen_vram.runtime.linear import many_rows_kernels as kernels
from qwen_vram.runtime.linear.few_rows_kernels import Matrix

BEYOND_L2 = 150e6
ROWS = (2, 8, 16, 32, 64)
SHAPES = {"gate": (18944, 3584), "down": (3584, 18944), "q": (3584, 3584), "k": (512, 3584)}
DIVISIONS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2)]
PROCESSES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    jobs = [(rows, division) for rows in ROWS for division in DIVISIONS]
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        pool.map(compile_all, [jobs[first::PROCESSES] for first in range(PROCESSES)])
    for name in SHAPES:
        for rows in ROWS:
            row = {**measured(name, rows), "device": torch.cuda.get_device_name(), "date": date.today().isoformat()}
            print(json.dumps(row), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def quantized(out: int, width: int, seed: int) -> tuple[Tensor, Any]:
    """A random matrix in nf4 with double quantization."""
    torch.manual_seed(seed)
    matrix = torch.randn(out, width, device="cuda", dtype=torch.bfloat16) * 0.02
    codes, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    return codes, state


def multiply(codes: Tensor, state: Any, ordered: Tensor, out: Tensor, division: tuple[int, int]) -> None:
    second = state.state2
    scales = (state.absmax, state.code, second.code, second.absmax, state.offset)
    matrix = Matrix(codes.view(-1).view(torch.int32), None, out, out.shape[1], scales, None)
    kernels.multiply(ordered, matrix, kernels.Config(*division))


def compile_all(jobs: list[tuple[int, tuple[int, int]]]) -> None:
    """Compile some kernels, in a process of its own, into Triton's cache."""
    codes, state = quantized(512, 3584, 0)
    for rows, division in jobs:
        x = torch.zeros(rows, 3584, device="cuda", dtype=torch.bfloat16)
        multiply(codes, state, kernels.fragments(x), x.new_empty(rows, 512), division)


def measured(name: str, rows: int) -> dict[str, Any]:
    """Microseconds of a product by each division."""
    height, width = SHAPES[name]
    matrices = [quantized(height, width, seed) for seed in range(max(2, min(8, int(BEYOND_L2 / (height * width / 2)))))]
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    ordered, out = kernels.fragments(x), x.new_empty(rows, height)
    expected = x @ functional.dequantize_4bit(*matrices[0]).T
    found = {}
    for division in DIVISIONS:
        multiply(*matrices[0], ordered, out, division)
        if (out - expected).abs().max() > 0.02 * expected.abs().max():
            print(f"wrong: {name}, {rows} rows, {division}", flush=True)
            continue

        def run(division: tuple[int, int] = division) -> None:
            for codes, state in matrices:
                multiply(codes, state, ordered, out, division)

        found[" x ".join(map(str, division))] = microseconds(run) / len(matrices)
    return {"matrix": name, "rows": rows, "us": found, "fragments_us": microseconds(lambda: kernels.fragments(x))}


def microseconds(run: Callable[[], object], times: int = 10) -> float:
    """Microseconds of a call, in a CUDA graph of some calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    graph.replay()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    graph.replay()
    last.record()
    torch.cuda.synchronize()
    return 1_000 * first.elapsed_time(last) / times


if __name__ == "__main__":
    main()
