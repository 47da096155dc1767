"""Measurement of this CPU's products with one row (decode steps) and many rows (prefills)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch

from qwen_vram.checkpoints.cpu_info import cpu_name
from qwen_vram.spec.formats import FORMATS

# The largest matrix of a layer of Qwen2.5-7B.
_MATRIX = (18_944, 3_584)
_WARM_UP = 3
_REPEATS = 15
_MANY_ROWS = 512
_FEW_REPEATS = 5


def plain_product_rate(size: int) -> int:
    """Return the bytes a second of products with bf16 matrices, which take `size` bytes together."""
    rows, columns = _MATRIX
    x = torch.ones(1, columns, dtype=torch.bfloat16)
    matrices = [torch.ones(rows, columns, dtype=torch.bfloat16) for _ in range(max(2, size // (2 * rows * columns)))]
    return _product_rate([partial(torch.nn.functional.linear, x, matrix) for matrix in matrices], 2 * rows * columns)


def packed_product_rate(size: int) -> int | None:
    """Return the stored bytes a second of products with NF4 matrices by bitsandbytes' fused kernel.

    The matrices take `size` bytes together. The rate is `None` if this CPU or bitsandbytes has no such kernel.
    """
    if find_spec("bitsandbytes") is None:
        return None
    from qwen_vram.runtime.linear.cpu_4bit import PackedMatrix, kernel_library, multiply

    if kernel_library() is None:
        return None
    rows, columns = _MATRIX
    nbytes, x = FORMATS["nf4"].nbytes(_MATRIX), torch.ones(1, columns, dtype=torch.bfloat16)
    matrices = [
        PackedMatrix(
            torch.ones(rows, columns // 2, dtype=torch.uint8),
            torch.ones(columns // 64, rows, dtype=torch.bfloat16),
            _MATRIX,
            64,
            "nf4",
        )
        for _ in range(max(2, size // nbytes))
    ]
    return _product_rate([partial(multiply, x, matrix, None) for matrix in matrices], nbytes)


def host_name() -> str:
    """Return the CPU's name, if the system tells it, and the number of threads that products use."""
    return f"{cpu_name()}, {torch.get_num_threads()} cores"


def many_rows_rate() -> int:
    """Return the operations a second (multiplications and additions) of a bf16 matrix times 512 rows."""
    rows, columns = _MATRIX
    x, matrix = torch.ones(_MANY_ROWS, columns, dtype=torch.bfloat16), torch.ones(rows, columns, dtype=torch.bfloat16)
    times = []
    for _ in range(_WARM_UP + _FEW_REPEATS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, matrix)
        times.append(time.perf_counter() - start)
    return int(2 * _MANY_ROWS * rows * columns / statistics.median(times[_WARM_UP:]))


def _product_rate(products: Sequence[Callable[[], object]], nbytes: int) -> int:
    """Return the bytes a second of products with matrices of `nbytes` each: the median of several rounds over all."""
    times = []
    for _ in range(_WARM_UP + _REPEATS):
        start = time.perf_counter()
        for product in products:
            product()
        times.append(time.perf_counter() - start)
    return int(len(products) * nbytes / statistics.median(times[_WARM_UP:]))
