"""Products on the CPU with the matrices of a decoder layer, format by format, beside 16 bits.

    python benchmarks/cpu_products.py OUT.jsonl            # half a minute on one core

Random matrices in the shapes of Qwen2.5-0.5B, in bf16. Each figure is the least of several calls by one thread, because
other processes may run. `times` is the time as a multiple of that of the 16-bit matrix with as many rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import bitsandbytes
import torch
from torch import nn

from qwen_vram.checkpoints.cpu_info import cpu_name, has_4bit_kernel
from qwen_vram.runtime.linear.int4 import Int4Linear
from qwen_vram.runtime.linear.int8_fp8 import Fp8Linear, Int8Linear

SHAPES = {"gate": (4_864, 896), "down": (896, 4_864)}
ROWS = (1, 8, 64)
OWN = {"int8-wo": Int8Linear, "int4": Int4Linear, "fp8": Fp8Linear}
CALLS, SECONDS = 15, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="rows are added to it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = {
        "device": cpu_name(), "has_4bit_kernel": has_4bit_kernel(), "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__, "date": date.today().isoformat(),
    }  # fmt: skip
    with options.out.open("a") as file, torch.inference_mode():
        for name, (rows, columns) in SHAPES.items():
            plain = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
            layers = {"bf16": plain, **{one: made(one, plain) for one in ("nf4", *OWN)}}
            for count in ROWS:
                x = torch.randn(count, columns, dtype=torch.bfloat16)
                least = {one: milliseconds(partial(layer, x)) for one, layer in layers.items()}
                for one, ms in least.items():
                    row = {"matrix": name, "rows": count, "format": one, "ms": ms, "times": ms / least["bf16"]}
                    print(row)
                    print(json.dumps({**row, **common}), file=file, flush=True)


def made(weights: str, plain: nn.Linear) -> nn.Module:
    """Return a layer in a format, of a plain one."""
    if weights == "nf4":
        columns, rows = plain.in_features, plain.out_features
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.load_state_dict(plain.state_dict())
        return layer.to(torch.bfloat16).to("cpu").eval()
    layer = copy.deepcopy(plain)
    OWN[weights].adopt(layer, stored=False)
    for name, tensor in OWN[weights].quantize(plain.weight.data).items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor)
    return layer


def milliseconds(call: Callable[[], object]) -> float:
    """Return the least time of some calls."""
    call()
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < CALLS and time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(1_000 * (time.perf_counter() - began))
    return min(times)


if __name__ == "__main__":
    main()
