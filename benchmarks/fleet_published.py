"""Predicted throughput and times of fleets beside those that others published for vLLM.

`python benchmarks/fleet_published.py` prints the table of docs/fleet.md. It runs nothing on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen_vram.fleet.engines import ENGINES
from qwen_vram.fleet.replica import Replica, make_replica
from qwen_vram.fleet.simulation.simulate import simulate
from qwen_vram.fleet.simulation.traffic import Request
from qwen_vram.spec.cards.find import find_gpu
from qwen_vram.spec.catalog import find


class Published(NamedTuple):
    """A published row: `requests` at once, or one alone if 1; `unit` says what `value` is."""

    source: str
    model: str
    gpu: str
    size: int
    requests: int
    prompt_len: int
    new_tokens: int
    unit: str
    value: float


_STACK = "docs.gpustack.ai/latest/performance-lab/qwen3-14b"
_TENSTORRENT = "github.com/tenstorrent/tt-inference-server/issues"
_MART = "databasemart.com/blog/vllm-gpu-benchmark-rtx4090"
TOKENS, STEP, FIRST = "tokens/s, prompts too", "ms a token", "ms to the first"
# GPUStack's rows are vLLM 0.11.0 "without any optimizations"; requests wait from the start. Their number is not stated
# on the page's part that was read, and 500 (100 of 32,000 tokens) are simulated. The model of databasemart is
# DeepSeek-R1-Distill-Qwen-7B, whose shapes are those of Qwen2.5-7B. Tenstorrent's rows are of GPUs, for comparison.
ROWS = (
    Published(f"{_STACK}/a100", "Qwen3-14B", "A100-80GB", 1, 500, 2000, 100, TOKENS, 5967.13),
    Published(f"{_STACK}/a100", "Qwen3-14B", "A100-80GB", 1, 500, 4000, 200, TOKENS, 5153.42),
    Published(f"{_STACK}/a100", "Qwen3-14B", "A100-80GB", 1, 100, 32000, 100, TOKENS, 4430.14),
    Published(f"{_STACK}/a100", "Qwen3-14B", "A100-80GB", 1, 500, 128, 4, TOKENS, 4916.63),
    Published(f"{_STACK}/h100", "Qwen3-14B", "H100-SXM", 1, 500, 2000, 100, TOKENS, 10597.19),
    Published(f"{_STACK}/h100", "Qwen3-14B", "H100-SXM", 1, 500, 4000, 200, TOKENS, 9218.03),
    Published(f"{_STACK}/h100", "Qwen3-14B", "H100-SXM", 1, 100, 32000, 100, TOKENS, 8298.56),
    Published(f"{_STACK}/h100", "Qwen3-14B", "H100-SXM", 1, 500, 128, 4, TOKENS, 5796.73),
    Published(_MART, "Qwen2.5-7B-Instruct", "RTX 4090", 1, 300, 100, 600, TOKENS, 5.96 * 700),
    Published(f"{_TENSTORRENT}/125", "Qwen2.5-7B-Instruct", "RTX 4090", 1, 1, 1024, 128, STEP, 17.2),
    Published(f"{_TENSTORRENT}/125", "Qwen2.5-7B-Instruct", "RTX 4090", 1, 1, 1024, 128, FIRST, 99.6),
    Published(f"{_TENSTORRENT}/143", "Qwen2.5-72B-Instruct", "H100-SXM", 2, 1, 1024, 128, STEP, 31.0),
    Published(f"{_TENSTORRENT}/143", "Qwen2.5-72B-Instruct", "H100-SXM", 2, 1, 1024, 128, FIRST, 129.2),
)


def replica_of(row: Published) -> Replica:
    """The replica of vLLM that a row ran."""
    engine = ENGINES["vllm"]
    return make_replica(
        row.model,
        find(row.model),
        engine,
        find_gpu(row.gpu),
        "bf16",
        row.size,
        longest=(row.prompt_len, row.new_tokens),
        mean_tokens=row.prompt_len + row.new_tokens,
        sequences=engine.sequences,
        step_tokens=engine.step_tokens,
    )


def predict(row: Published) -> float:
    """The prediction of a row, in its unit."""
    replica = replica_of(row)
    requests = [Request(0.0, row.prompt_len, row.new_tokens)] * row.requests
    run = simulate(requests, replica.times, replica.limits)
    if row.unit == TOKENS:
        return row.requests * (row.prompt_len + row.new_tokens) / run.seconds
    one = run.served[0]
    return 1000 / one.speed if row.unit == STEP else 1000 * one.wait


def main() -> None:
    """Print the rows as a Markdown table."""
    print("| source | model | GPU | requests | prompt + new | unit | published | predicted | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        predicted = predict(row)
        lengths, gpus = f"{row.prompt_len:,} + {row.new_tokens}", f"{row.size} x {row.gpu}"
        numbers = f"{row.value:,.1f} | {predicted:,.1f} | {predicted / row.value - 1:+.0%}"
        print(f"| {row.source} | {row.model} | {gpus} | {row.requests} | {lengths} | {row.unit} | {numbers} |")


if __name__ == "__main__":
    main()
