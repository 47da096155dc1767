"""Metrics of a server in front of vLLM: its own, the plan's, and those of vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from qwen_vram.planning.vllm.memory import VllmMemory
from qwen_vram.serving.vllm.startup_log import Reported
from qwen_vram.serving.web.metrics import Metrics, metric_lines, state_lines

# Parts of the plan that vLLM's log states too.
_PARTS = ("weights", "graphs", "kv_cache", "context", "buffers", "activations", "margin")


def metrics_text(
    metrics: Metrics, state: str, running: int, memory: VllmMemory, reported: Reported, group: int, own: str
) -> str:
    """Return all metrics in Prometheus' text format.

    Args:
        group: The number of vLLM's first process.
        own: The text of vLLM's own metrics.
    """
    return "\n".join([*_lines(metrics, state, running, memory, reported, group), own])


def _lines(
    metrics: Metrics, state: str, running: int, memory: VllmMemory, reported: Reported, group: int
) -> Iterator[str]:
    yield from metrics.request_lines()
    yield from metric_lines("requests_running", "gauge", "Requests that run now.", [({}, running)])
    yield from state_lines(state)
    sizes = dict(reported.sizes)
    rows: list[tuple[dict[str, str], float]] = []
    for part in _PARTS:
        rows.append(({"part": part, "kind": "predicted"}, getattr(memory, part)))
        if part in sizes:
            rows.append(({"part": part, "kind": "reported"}, sizes[part]))
    yield from metric_lines("memory_bytes", "gauge", "Memory of a worker by part: planned, and by vLLM's log.", rows)
    for name, words, planned, stated in (
        ("vllm_cache_tokens", "Tokens that the KV cache holds.", memory.tokens, reported.tokens),
        ("vllm_concurrency", "Sequences of full length that it holds.", memory.concurrency, reported.concurrency),
    ):
        rows = [({"kind": "predicted"}, planned)]
        if stated is not None:
            rows.append(({"kind": "reported"}, stated))
        yield from metric_lines(name, "gauge", words, rows)
    words = "Resident sets of this server's process, and of vLLM's processes together."
    resident: list[tuple[dict[str, str], float]] = [
        ({"process": "server"}, psutil.Process().memory_info().rss),
        ({"process": "vllm"}, _resident(group)),
    ]
    yield from metric_lines("process_resident_bytes", "gauge", words, resident)


def _resident(group: int) -> int:
    """Return the resident sets of a process and all that it started; 0 if it has ended."""
    try:
        first = psutil.Process(group)
        processes = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total
