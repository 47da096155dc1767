"""Measurement of launches on a GPU: a layer by Python, and a small kernel in a CUDA graph."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from qwen_vram.arithmetic.timing.launches import STEP_LAYERS

# The bundled model's kernels are small, so a step waits for Python alone.
_WORK: dict[str, Any] = {"prompt_len": 64, "max_new_tokens": 128}
_ROUNDS = 5
_NODES = 1000
_ELEMENTS = 4096
_ROWS, _MATRIX = 4096, (18_944, 3_584)


def layer_launch_time() -> int:
    """Return the nanoseconds for each layer of a decode step of the bundled model in 16 bits."""
    import qwen_vram as qv
    from qwen_vram.demo import CHECKPOINT

    knobs: dict[str, Any] = {"weights": "bf16", "attention": "fused", "cache": "preallocated", "progress": False}
    with qv.load(CHECKPOINT, profile="default", **knobs, **_WORK) as llm:
        reports = [llm.probe() for _ in range(_ROUNDS)]
        layers = llm.model.config.num_hidden_layers + STEP_LAYERS
    times = [one.times.measured.ms_per_token for one in reports if one.times and one.times.measured.ms_per_token]
    return int(1e6 * statistics.median(times) / layers)


def graph_node_time(device: torch.device) -> int:
    """Return the nanoseconds of a small kernel that follows another one in a CUDA graph."""
    x = torch.zeros(_ELEMENTS, device=device)
    x.add_(1)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_NODES):
            x.add_(1)
    graph.replay()
    return int(1e9 * _seconds(graph.replay) / _NODES)


def matmul_rate(device: torch.device) -> int:
    """Return the operations a second of a bf16 matrix times 4,096 rows, in the steady state."""
    rows, columns = _MATRIX
    x = torch.randn(_ROWS, columns, dtype=torch.bfloat16, device=device)
    matrix = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
    result = torch.empty(_ROWS, rows, dtype=torch.bfloat16, device=device)

    def products() -> None:
        for _ in range(_ROUNDS):
            torch.mm(x, matrix.t(), out=result)

    products()
    return int(2 * _ROUNDS * _ROWS * rows * columns / _seconds(products))


def _seconds(work: Any) -> float:
    """Return the median seconds of several rounds, by CUDA events."""
    event: Any = torch.cuda.Event  # its constructor has no types
    times = []
    for _ in range(3 * _ROUNDS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return float(statistics.median(times))
