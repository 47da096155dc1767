"""A case, and the figures of its row that all libraries have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.timing.generation import Times
from qwen_vram.benchmark.token_times import TokenTimes


class Case(NamedTuple):
    """One configuration with one workload, as plain data for the process that measures it.

    Attributes:
        model: A checkpoint folder or a name.
        by, arguments: As in `Configuration`.
        device: `"cuda"` or `"cpu"`.
    """

    model: str
    by: str
    arguments: dict[str, Any]
    prompt_len: int
    max_new_tokens: int
    batch_size: int
    device: str

    @property
    def workload(self) -> dict[str, Any]:
        """The lengths as keyword arguments."""
        return {name: getattr(self, name) for name in ("prompt_len", "max_new_tokens", "batch_size")}


def predicted(estimate: Estimate, times: Times, *, on_cpu: bool) -> dict[str, float | int | None]:
    """Return the predicted figures. The estimate counts no allocator and no process on a CPU."""
    return {
        "weights": estimate.weights,
        "kv_cache": estimate.kv_cache,
        "peak": None if on_cpu else estimate.peak_allocated,
        "process_total": None if on_cpu else estimate.process_total,
        "first_token_ms": times.first_token_ms,
        "ms_per_token": times.ms_per_token if estimate.workload.max_new_tokens > 1 else None,
    }


def measured_memory(found: dict[str, int], device: torch.device) -> dict[str, int | None]:
    """Return the measured bytes of a generation; on a CPU those of the process by the system."""
    parts = {name: found.get(name) for name in ("weights", "kv_cache")}
    if device.type == "cuda":
        return {**parts, "peak": found.get("peak_allocated"), "process_total": found.get("process_total")}
    return {**parts, "peak": _most_resident(), "process_total": int(psutil.Process().memory_info().rss)}


def measured_times(cold: TokenTimes, warm: TokenTimes) -> dict[str, float | None]:
    """Return the measured milliseconds of both generations."""
    median, high = cold.step_ms()
    return {
        "first_token_ms": warm.first_token_ms,
        "first_token_cold_ms": cold.first_token_ms,
        "ms_per_token": median,
        "ms_per_token_p90": high,
    }


def _most_resident() -> int | None:
    """The largest resident set of this process so far; `None` if the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else None
