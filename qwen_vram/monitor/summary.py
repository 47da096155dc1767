"""Peaks of a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_vram.monitor.sample import Sample


@dataclass(frozen=True)
class PlanPeak:
    """The most bytes that a model's process used, beside its promise.

    `peak` is `None` if the driver never told it. `promised` is `None` on the CPU, where a plan counts tensors alone.
    """

    pid: int
    model: str
    promised: int | None
    peak: int | None


@dataclass(frozen=True)
class LogSummary:
    """Times and peaks of some samples.

    Attributes:
        first, last: Times of the first and the last sample; empty without samples.
        peak: The most used bytes of each GPU by UUID, and of the host.
        total: All bytes of each of them.
        plans: Models that were loaded meanwhile.
    """

    samples: int
    first: str = ""
    last: str = ""
    peak: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    plans: tuple[PlanPeak, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`."""
        return asdict(self)


def summary_of(samples: Sequence[Sample]) -> LogSummary:
    """Return the peaks of samples."""
    peak: dict[str, int] = {}
    total: dict[str, int] = {}
    plans: dict[tuple[int, str, int | None], int | None] = {}
    for sample in samples:
        used = {gpu.uuid: (gpu.used, gpu.total) for gpu in sample.gpus}
        used["host"] = (sample.host.total - sample.host.available, sample.host.total)
        for device, (now, whole) in used.items():
            peak[device], total[device] = max(peak.get(device, 0), now), whole
        for plan in sample.plans:
            key = (plan.pid, plan.model, plan.total)
            known = [one for one in (plans.get(key), plan.used) if one is not None]
            plans[key] = max(known, default=None)
    found = tuple(PlanPeak(pid, model, promised, most) for (pid, model, promised), most in plans.items())
    times = [sample.time for sample in samples]
    return LogSummary(len(samples), times[0] if times else "", times[-1] if times else "", peak, total, found)
