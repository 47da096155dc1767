"""Facts of a loaded model that a monitor reads: plan, GPUs and measured bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.measure import PARTS, Report

Measured = Mapping[torch.device, dict[str, int]]


def facts_of(plan: Plan, measured: Measured) -> dict[str, Any]:
    """Return the facts of a model that was just loaded, for `running_plans.Publication`."""
    uuids = [str(torch.cuda.get_device_properties(one).uuid) for one in measured if one.type == "cuda"]
    promised = plan.estimate.parts()
    if uuids:
        promised = {part: getattr(plan.estimate, part) for part in PARTS}
    else:
        del promised["workspace"]  # of a GPU
    return {
        "model": plan.estimate.model,
        "call": plan.call,
        "uuids": uuids,
        "promised": promised,
        "measured": summed(plan, measured),
        "generations": 0,
    }


def summed(plan: Plan, measured: Measured) -> dict[str, int]:
    """Return the measured bytes by part, summed over several GPUs."""
    return dict(Report.of(plan.estimate, dict(measured)).measured)
