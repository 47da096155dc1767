"""Products of a few rows with matrices of Qwen2.5-7B on a GPU: which division among programs is fastest.

    python benchmarks/few_rows.py OUT.jsonl                # three minutes on an H200
    python benchmarks/few_rows.py OUT.jsonl --formats nf4 --rows 1

Each figure is of a CUDA graph of many launches, over so many matrices that the L2 cache holds none of them. `share` is
the part of the memory's rate that was reached. A division whose product is wrong, or that does not compile, is printed
and left out. Beside them: the kernel of bitsandbytes, and cuBLAS over bf16 matrices. The best of each cell ends it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_vram.runtime.linear import few_rows_kernels, int4_kernels
from qwen_vram.runtime.linear.few_rows_kernels import LOAD, PERMUTE, SHUFFLE, Config, Matrix
from qwen_vram.runtime.linear.int4_packing import unpack_tiles

RATE = 4.8e12  # bytes a second. Source: NVIDIA H200 datasheet
BEYOND_L2 = 200 * 2**20
HIDDEN, INTERMEDIATE = 3584, 18944
SHAPES = {
    "gate": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "q": (HIDDEN, HIDDEN),
    "k": (512, HIDDEN),
    "head": (152064, HIDDEN),
}
FORMATS = ("nf4", "int4", "int8-wo", "fp8", "dense")
GROUPS = {"qkv": ("q", "k", "k"), "swiglu": ("gate", "gate")}

_FOUR_BIT = [
    *(Config(*one, SHUFFLE) for one in [(4, 32, 1), (4, 128, 4), (2, 128, 4), (16, 32, 4), (8, 32, 1), (2, 32, 1)]),
    *(Config(*one, PERMUTE) for one in [(4, 32, 1), (4, 128, 4), (2, 128, 4), (16, 32, 4)]),
    *(Config(*one, SHUFFLE) for one in [(8, 32, 4), (4, 16, 1), (4, 64, 2), (1, 128, 4), (8, 128, 4), (1, 256, 8)]),
    *(Config(*one, LOAD) for one in [(4, 32, 1), (4, 128, 4)]),
]
_EIGHT_BIT = [
    Config(*one)
    for one in [
        (4, 32, 1), (4, 128, 4), (2, 128, 4), (16, 32, 4), (8, 32, 1), (2, 256, 8), (4, 64, 2), (1, 256, 8), (8, 32, 4)
    ]
]  # fmt: skip
# Rows are multiples of 8, a step is in blocks of 128 columns, and the last number is of steps between load and product.
_INT4 = [
    Config(*one, LOAD, ahead)
    for ahead in (1, 2, 3)
    for one in [(16, 4, 4), (32, 4, 4), (16, 2, 2), (32, 2, 2), (16, 8, 8), (32, 8, 8), (16, 1, 1), (16, 16, 16)]
]
_INT4_MORE = [
    Config(*one, LOAD, 2) for one in [(16, 4, 4), (32, 4, 4), (16, 2, 2), (32, 2, 2), (16, 8, 8), (16, 16, 16)]
]
_INT4_GROUPS = [Config(*one[:3], LOAD, ahead) for one in _INT4_MORE for ahead in (1, 2, 3)]
_FOUR_BIT_MORE = {
    4: [Config(*one, SHUFFLE) for one in [(4, 32, 1), (2, 128, 4), (4, 128, 4), (8, 32, 4)]]
    + [Config(2, 128, 4, PERMUTE)],
    8: [Config(*one, SHUFFLE) for one in [(2, 32, 1), (2, 128, 4), (8, 32, 4)]],
}
_EIGHT_BIT_MORE = {
    4: [Config(*one) for one in [(4, 32, 1), (2, 128, 4), (4, 128, 4), (8, 32, 4)]],
    8: [Config(*one) for one in [(2, 32, 1), (2, 128, 4), (8, 32, 4)]],
}
_FOUR_BIT_GROUPS = [Config(*one, SHUFFLE) for one in [(4, 32, 1), (2, 128, 4), (16, 32, 4)]]
_FOUR_BIT_GROUPS.append(Config(2, 128, 4, PERMUTE))
_EIGHT_BIT_GROUPS = [Config(*one) for one in [(4, 32, 1), (2, 128, 4), (16, 32, 4)]]


class Job(NamedTuple):
    """One kernel to compile and measure: a format, a number of rows, a group of matrices or one, and a division."""

    storage: str
    m: int
    group: str
    config: Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="rows are added to it")
    parser.add_argument("--seconds", type=float, default=200, help="no figure is begun later than this")
    parser.add_argument("--each", type=float, default=0.02, help="seconds for each figure")
    parser.add_argument("--formats", nargs="+", default=[*FORMATS])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    began = time.perf_counter()
    todo = [job for job in jobs(options.rows) if job.storage in options.formats]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool, options.out.open("a") as file:
        compiled = {job: pool.submit(compile_one, job) for job in todo}
        common = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": few_rows_kernels.triton.__version__,
        }
        common["date"] = date.today().isoformat()
        with torch.inference_mode():
            for row in measured(todo, compiled, options.each, began + options.seconds):
                print(json.dumps({**row, **common}), file=file, flush=True)
        pool.shutdown(cancel_futures=True)
    print(f"{time.perf_counter() - began:.0f} s")


def jobs(rows: list[int]) -> Iterator[Job]:
    """The most valuable first."""
    for m in rows:
        for storage in FORMATS:
            four_bit = storage == "nf4"
            if storage == "dense" and m > 2:
                continue
            if storage == "int4":
                yield from (Job(storage, m, "", config) for config in (_INT4 if m == 1 else _INT4_MORE))
                continue
            if m == 1:
                yield from (Job(storage, 1, "", config) for config in (_FOUR_BIT if four_bit else _EIGHT_BIT))
            else:
                more = _FOUR_BIT_MORE if four_bit else _EIGHT_BIT_MORE
                yield from (Job(storage, m, "", config) for config in more.get(m, more[4]))
        if m == 1:
            for storage in FORMATS:
                for group in GROUPS:
                    configs = {"nf4": _FOUR_BIT_GROUPS, "int4": _INT4_GROUPS}.get(storage, _EIGHT_BIT_GROUPS)
                    yield from (Job(storage, 1, group, config) for config in configs)


def compile_one(job: Job) -> str:
    """Run a kernel once on small matrices, so that Triton keeps it on disk; returns an error or nothing.

    Triton compiles anew for arguments that are no multiples of 16, and these and all of `SHAPES` are.
    """
    try:
        x = torch.ones(job.m, 1024, dtype=torch.bfloat16, device="cuda")
        launch(job, x, [made(job.storage, 64, 1024, job.m) for _ in range(len(GROUPS.get(job.group, "1")))])
        torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {str(error).strip()[-300:]}"
    return ""


def launch(job: Job, x: Tensor, matrices: list[Matrix]) -> None:
    kernels = int4_kernels if job.storage == "int4" else few_rows_kernels
    if job.group == "swiglu":
        kernels.swiglu(x, *matrices, job.storage, job.config)
    elif job.group == "qkv":
        biased = tuple(one._replace(bias=x[0, : one.rows]) for one in matrices)  # any numbers
        kernels.multiply(x, biased, job.storage, job.config)
    else:
        kernels.multiply(x, tuple(matrices), job.storage, job.config)


def made(storage: str, rows: int, width: int, m: int) -> Matrix:
    """A matrix of random codes."""
    out = torch.zeros(m, rows, dtype=torch.bfloat16, device="cuda")
    if storage == "dense":
        matrix = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        return Matrix(matrix.view(-1).view(torch.int32), None, out, rows, (out,))
    count = rows * width // (2 if storage in ("nf4", "int4") else 1)
    codes = torch.randint(-(2**31), 2**31 - 1, (count // 4,), dtype=torch.int32, device="cuda")
    if storage == "int8-wo":
        scales = (torch.rand(rows, device="cuda").to(torch.bfloat16),)
    elif storage == "int4":
        scales = (torch.rand(width // 128, rows, 2, device="cuda").to(torch.bfloat16).view(torch.int32),)
    elif storage == "fp8":
        as_bytes = codes.view(torch.uint8)
        as_bytes[(as_bytes & 127) == 127] = 0  # no NaN
        scales = (torch.rand(rows, device="cuda"),)
    else:
        from bitsandbytes.functional import create_dynamic_map, get_4bit_type

        blocks = rows * width // 64
        scales = (
            torch.randint(0, 255, (blocks,), dtype=torch.uint8, device="cuda"),
            get_4bit_type(storage, device="cuda"),
            create_dynamic_map().cuda(),
            torch.rand(-(-blocks // 256), device="cuda"),
            torch.tensor(0.5, device="cuda"),
        )
    return Matrix(codes, None, out, rows, scales)


def dequantized(storage: str, matrix: Matrix, width: int, rows: int) -> Tensor:
    """The first rows in float64."""
    if storage == "dense":
        return matrix.weight.view(torch.bfloat16)[: rows * width].view(rows, width).double()
    if storage == "int4":
        tiles = matrix.weight[: rows * width // 8].view(rows // 8, width // 128, 32, 4)
        groups = torch.empty(rows, width, dtype=torch.int8, device="cuda")
        unpack_tiles(tiles, groups)
        levels = matrix.scales[0].view(torch.bfloat16).view(width // 128, -1, 2)[:, :rows].transpose(0, 1).double()
        return (groups.view(rows, -1, 128).double() * levels[..., :1] + levels[..., 1:]).view(rows, width)
    codes = matrix.weight.view(torch.uint8)
    if storage == "int8-wo":
        values = codes[: rows * width].view(torch.int8).view(rows, width).double()
        return values * matrix.scales[0][:rows, None].double()
    if storage == "fp8":
        values = codes[: rows * width].view(torch.float8_e4m3fn).view(rows, width).to(torch.float32).double()
        return values * matrix.scales[0][:rows, None].double()
    absmax, table, code, outer, offset = matrix.scales
    codes = codes[: rows * width // 2]
    values = table[torch.stack((codes >> 4, codes & 15), 1).int()].double().view(-1, 64)
    absmax = absmax[: len(values)].int()
    place = torch.arange(len(values), device="cuda") // 256
    blocks = code[absmax].double() * outer[place].double() + offset.double()
    return (values * blocks[:, None]).view(rows, width)


class Cell:
    """Matrices of one shape or group, and what their products with random rows are."""

    def __init__(self, storage: str, names: tuple[str, ...], m: int) -> None:
        shapes = [SHAPES[name] for name in names]
        self.names, self.storage, self.m, self.width = names, storage, m, shapes[0][1]
        first = [made(storage, *shape, m) for shape in shapes]
        self.bytes = sum(one.weight.nbytes + one.out.nbytes + sum(s.nbytes for s in one.scales) for one in first)
        copies = -(-BEYOND_L2 // self.bytes)
        others = [[made(storage, *shape, m) for shape in shapes] for _ in range(copies - 1)]
        self.sets = [first, *others]
        self.x = torch.randn(m, self.width, device="cuda").to(torch.bfloat16)
        self.expected, self.bounds = [], []
        for one in first:
            exact = dequantized(storage, one, self.width, min(one.rows, 3584))
            product = self.x.double() @ exact.t()
            # What a product by torch errs by, whose matrix is rounded to 16 bits, and half a unit of the result's.
            torchs = (self.x @ exact.to(torch.bfloat16).t()).double()
            self.expected.append(product)
            self.bounds.append((torchs - product).abs().max().item() + product.abs().max().item() * 2**-8)

    def wrong(self, job: Job) -> str:
        """Return by how much a kernel errs on the first matrices; empty if it is right."""
        matrices = self.sets[0]
        for one in matrices:
            one.out.zero_()
        launch(job, self.x, matrices)
        expected, bounds = self.expected, self.bounds
        if job.group == "qkv":
            expected = [one + self.x[0, : one.shape[1]].double() for one in expected]
        if job.group == "swiglu":
            gate, up = expected
            expected = [torch.nn.functional.silu(gate) * up]
            bounds = [expected[0].abs().max().item() * 2**-6]
        for index, (matrix, product, bound) in enumerate(zip(matrices, expected, bounds, strict=False)):
            error = (matrix.out[:, : product.shape[1]].double() - product).abs().max().item()
            if not error <= bound:
                return f"matrix {index}: errs by {error:.3g}, allowed {bound:.3g}"
        return ""


def measured(todo: list[Job], compiled: dict[Job, Future[str]], each: float, end: float) -> Iterator[dict[str, Any]]:
    """A row for each figure."""
    cells: dict[tuple[str, int, str], list[Config]] = {}
    for job in todo:
        for name in (job.group,) if job.group else SHAPES:
            cells.setdefault((job.storage, job.m, name), []).append(job.config)
    best: list[str] = []
    for (storage, m, name), configs in cells.items():
        if time.perf_counter() > end:
            print("out of time")
            break
        group = name if name in GROUPS else ""
        cell = Cell(storage, GROUPS.get(name, (name,)), m)
        rows = []
        for label, read, products in others(cell) if not group else ():
            try:
                rows.append({"kernel": label, "bytes": read, "us": microseconds(products, each)})
            except Exception as error:  # another version of the library
                print(f"{storage} M={m} {name} {label}: {str(error).strip()[:200]}")
        for config in configs:
            if time.perf_counter() > end:
                break
            job = Job(storage, m, group, config)
            label = "/".join(map(str, config))
            problem = compiled[job].result() or cell.wrong(job)
            if problem:
                print(f"{storage} M={m} {name} {label}: {problem}", flush=True)
                continue
            calls = [partial(launch, job, cell.x, one) for one in cell.sets]
            rows.append({"kernel": label, "bytes": cell.bytes, "us": microseconds(calls, each)})
        for row in rows:
            row |= {"format": storage, "m": m, "shape": name, "gb_s": round(row["bytes"] / row["us"] / 1e3)}
            row["share"] = round(row["gb_s"] * 1e9 / RATE, 3)
            print(
                f"{storage} M={m} {name:6} {row['kernel']:18} {row['us']:8.2f} us "
                f"{row['gb_s']:5} GB/s {row['share']:.0%}"
            )
            yield row
        if rows:
            top = min((row for row in rows if "/" in row["kernel"]), key=lambda row: row["us"], default=rows[0])
            rest = " ".join(f"{row['kernel']} {row['us']:.2f}" for row in rows if "/" not in row["kernel"])
            best.append(f"{storage} M={m} {name:6} {top['kernel']:18} {top['us']:8.2f} us {top['share']:.0%}  {rest}")
    print("\nbest of each cell")
    print("\n".join(best), flush=True)


def others(cell: Cell) -> Iterator[tuple[str, int, list[Callable[[], Any]]]]:
    """Kernels of bitsandbytes, torch, and cuBLAS over matrices in 16 bits: what is read, and a call for each matrix."""
    if cell.storage == "int4":

        def by_tinygemm(one: Matrix) -> Tensor:
            codes = one.weight.view(one.rows // 8, cell.width // 128, 32, 4)
            levels = one.scales[0].view(torch.bfloat16).view(cell.width // 128, one.rows, 2)
            return torch.ops.aten._weight_int4pack_mm(cell.x, codes, 128, levels)

        yield "tinygemm", cell.bytes, [partial(by_tinygemm, one[0]) for one in cell.sets]
    if cell.storage == "nf4":
        import bitsandbytes  # noqa: F401

        def by_bitsandbytes(one: Matrix) -> Tensor:
            absmax, _, code, outer, offset = one.scales
            shape = (one.rows, cell.width)
            product: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
                cell.x, one.weight.view(torch.uint8).view(-1, 1), shape, outer, 64, "nf4",
                bias=None, absmax_8bit=absmax, absmax_code=code, absmax_offset=offset,
            )  # fmt: skip
            return product

        yield "bitsandbytes", cell.bytes, [partial(by_bitsandbytes, one[0]) for one in cell.sets]
        shape = (cell.sets[0][0].rows, cell.width)
        copies = -(-BEYOND_L2 // (2 * shape[0] * shape[1]))
        matrices = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        yield "cublas", matrices[0].nbytes, [partial(torch.mm, cell.x, one.t()) for one in matrices]


def microseconds(calls: list[Callable[[], Any]], seconds: float) -> float:
    """Of one call, in a CUDA graph of all of them, again and again for about `seconds`."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 24 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        took: float = start.elapsed_time(stop)
        return 1_000 * took / times

    once = min(replay(1), replay(1))
    times = max(2, round(seconds * 1e6 / once))
    return round(replay(times) / (rounds * len(calls)), 3)


if __name__ == "__main__":
    main()
