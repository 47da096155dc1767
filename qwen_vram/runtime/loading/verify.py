"""Check of a loaded model against its plan, by one prefill and one decode step."""

from __future__ import annotations

import gc

import torch

from qwen_vram.errors import PlanNotHeldError
from qwen_vram.runtime.loaded_model import LoadedModel
from qwen_vram.runtime.measure import Report
from qwen_vram.units import format_bytes

# Tolerance of the parts that are computed. Reserved bytes depend on addresses that the driver chooses. They are part of
# the process memory, which is compared with the budget.
_TOLERANCE = 0.01
_PROMISED = ("weights", "kv_cache", "load_peak", "peak_allocated")
# Predictions of a small model's peaks can miss by a segment of the allocator.
_SLACK = 2 * 2**20


def verify(llm: LoadedModel) -> Report:
    """Run the largest planned prefill and one decode step from random tokens; return the measured memory.

    The cache has its full size, but a dynamic cache has only the tokens that are fed. No memory stays reserved.

    Raises:
        PlanNotHeldError: a part is more than 1 % above the plan, the process is above its budget, or memory ran out.
    """
    try:
        report = llm.probe(steps=2)
    except torch.OutOfMemoryError as error:
        raise PlanNotHeldError(
            f"the plan does not hold: {llm.plan.estimate.process_total:,} bytes were promised, and memory ran out at "
            f"the planned workload; something else may have taken it, or pass a smaller vram. ({error})",
            parts={},
        ) from error
    finally:
        gc.collect()
        if llm.device.type == "cuda":
            torch.cuda.empty_cache()
    budget = llm.plan.budget
    if not report.devices:
        offered = budget.vram if llm.device.type == "cuda" else None
        _check(report, offered, "")
    for device, one in report.devices.items():
        _check(one, budget.devices[device], f" on GPU {device}")
    return report


def _check(report: Report, budget: int | None, where: str) -> None:
    """Compare one device's parts with its promised memory."""
    parts = {
        part + where: (predicted, measured)
        for part, predicted, measured in report.lines()
        if part in _PROMISED and measured is not None and measured > predicted * (1 + _TOLERANCE) + _SLACK
    }
    process = report.measured.get("process_total")
    if budget is not None and process is not None and process > budget:
        parts["process_total" + where] = (report.estimate.process_total, process)
    if parts:
        raise PlanNotHeldError(_message(parts, budget), parts=parts)


def _message(parts: dict[str, tuple[int, int]], budget: int | None) -> str:
    found = "; ".join(
        f"{part}: {predicted:,} bytes promised, {measured:,} taken" for part, (predicted, measured) in parts.items()
    )
    allowed = "" if budget is None else f"; the budget is {budget:,} bytes ({format_bytes(budget)})"
    return (
        f"the plan does not hold: {found}{allowed}. Pass a smaller vram, and please report this with the "
        "model, the knobs and the versions of torch and transformers"
    )
