"""From how many rows on an int4 matrix is better dequantized by tiles than read by torch's kernel.

    python benchmarks/unpack_rows.py                       # the MLP and attention matrices of Qwen2.5-7B
    python benchmarks/unpack_rows.py --shapes 2048x2048

Milliseconds of one product each way, and of the plain bf16 product. `UNPACK_FROM_ROWS` in
`qwen_vram/arithmetic/tiling.py` is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from qwen_vram.runtime.linear.int4 import Int4Linear
from qwen_vram.runtime.linear.tiled import tiled_product

ROWS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 512, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["18944x3584", "3584x18944", "3584x3584"])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each figure")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for shape in options.shapes:
        out_features, in_features = map(int, shape.split("x"))
        plain = torch.randn(out_features, in_features, dtype=torch.bfloat16, device=device) / 64
        layer = quantized(plain)
        for rows in options.rows:
            x = torch.randn(rows, in_features, dtype=torch.bfloat16, device=device)
            tile = partial(layer.dequantize, dtype=x.dtype)
            figures = {
                "kernel_ms": milliseconds(partial(layer.read, x), options.seconds),
                "tiles_ms": milliseconds(partial(tiled_product, x, out_features, tile, None), options.seconds),
                "bf16_ms": milliseconds(partial(functional.linear, x, plain), options.seconds),
            }
            row = {"device": name, "torch": torch.__version__, "shape": shape, "rows": rows, **figures}
            print(json.dumps(row), flush=True)


def quantized(matrix: torch.Tensor) -> Int4Linear:
    layer = nn.Linear(*reversed(matrix.shape), bias=False, device="meta", dtype=matrix.dtype)
    Int4Linear.adopt(layer, stored=False)
    made = Int4Linear.quantize(matrix)
    layer.weight = nn.Parameter(made.pop("weight"), requires_grad=False)
    layer.scales_and_zeros = made["scales_and_zeros"]
    assert isinstance(layer, Int4Linear)
    return layer


@torch.inference_mode()
def milliseconds(product: Callable[[], torch.Tensor], seconds: float) -> float:
    """Mean time of one product over at least `seconds`."""
    for _ in range(3):
        product()
    wait()
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            product()
        wait()
        runs += 10
    return round(1000 * (time.perf_counter() - began) / runs, 4)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
