"""Number of layers on each of several GPUs.

The division keeps the smallest free share of a GPU as large as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.gpu_split import split_estimate, split_of
from qwen_vram.arithmetic.pipeline import slices
from qwen_vram.arithmetic.process import process_bytes
from qwen_vram.errors import WorkloadError
from qwen_vram.planning.capacity.fit import live_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.rules.table import check_split
from qwen_vram.spec.workload import Workload

# Layers that are moved at once: because of fragments, one more layer can give a better result than one less.
_MOST_MOVED = 3
# The least bytes that all GPUs need together are nearly the same for every split. Only the rests of blocks that torch's
# allocator does not split differ, by less than a hundredth (tests/arithmetic/test_split.py).
_SURELY_TOO_MUCH = 1.01


def balanced(
    label: str,
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    budgets: Mapping[int, int],
    held: Mapping[int, int] | None = None,
    *,
    machine: Machine,
) -> Estimate:
    """Find the split over all of `budgets` (GPU -> bytes) whose fullest GPU needs the smallest share of its budget.

    Every GPU gets at least one layer, in the order of `budgets`. The needed bytes grow almost in proportion to the
    layers, which gives the first split. If the budgets could hold it in total, layers are then moved from the fullest
    GPU to the one with the smallest share. This ends when exact estimates show no better split. Fragments are not a
    smooth function of the layers: another split may be better by less than a hundredth.

    Raises:
        WorkloadError: more GPUs than layers; a context that exceeds the model's positions.
        NotSupportedError: a knob that works on one GPU only.
    """
    check_split(profile, len(budgets))
    if len(budgets) > architecture.num_hidden_layers:
        raise WorkloadError(
            f"vram names {len(budgets)} GPUs for a model of num_hidden_layers {architecture.num_hidden_layers}; name "
            "at most one for each layer",
            name="vram",
            got=dict(budgets),
        )
    counts = _first_guess(label, architecture, profile, workload, budgets, machine)
    best = split_estimate(label, architecture, profile, workload, counts, machine=machine, held=held)
    if sum(map(_at_least, best.devices.values())) > _SURELY_TOO_MUCH * sum(budgets.values()):
        return best  # nor does any other split fit
    while True:
        shares, counts = _shares(best, budgets), split_of(best)
        full, emptiest = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
        following, fullest = best, shares[full]
        for moved in range(1, min(_MOST_MOVED, counts[full] - 1) + 1) if full != emptiest else ():
            moved_counts = {**counts, full: counts[full] - moved, emptiest: counts[emptiest] + moved}
            other = split_estimate(label, architecture, profile, workload, moved_counts, machine=machine, held=held)
            # The least needed bytes, which take no replay, already exclude most splits.
            if _fullest(other, budgets, _at_least) < fullest and _fullest(other, budgets) < fullest:
                following, fullest = other, _fullest(other, budgets)
        if following is best:
            return best
        best = following


def _needed(part: Estimate) -> int:
    return part.needed_bytes


def _at_least(part: Estimate) -> int:
    return live_bytes(part) + process_bytes(0, part.profile, part.machine, part.held)


def _shares(
    result: Estimate, budgets: Mapping[int, int], size: Callable[[Estimate], int] = _needed
) -> dict[int, float]:
    """The share of its budget that each GPU needs."""
    return {device: size(part) / max(1, budgets[device]) for device, part in result.devices.items()}


def _fullest(result: Estimate, budgets: Mapping[int, int], size: Callable[[Estimate], int] = _needed) -> float:
    return max(_shares(result, budgets, size).values())


def _first_guess(
    label: str,
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    budgets: Mapping[int, int],
    machine: Machine,
) -> dict[int, int]:
    """Layers of each GPU, added one by one to the GPU with the smallest share, by lines through two estimates."""
    last = len(budgets) - 1
    most = architecture.num_hidden_layers - last

    def needed(place: int, count: int) -> int:
        others = architecture.num_hidden_layers - count
        if place in (0, last):
            around = (count, others) if place == 0 else (others, count)
            part = list(slices(architecture, [number for number in around if number]))[-1 if place else 0]
        else:
            part = list(slices(architecture, (1, count, others - 1)))[1]
        return _at_least(estimate(label, part, profile, workload, machine=machine))

    line = {}
    for place, device in enumerate(budgets):
        least = needed(place, 1)
        line[device] = (least, (needed(place, most) - least) / max(1, most - 1))
    counts = dict.fromkeys(budgets, 1)
    for _ in range(architecture.num_hidden_layers - len(budgets)):
        fill = {
            device: (line[device][0] + counts[device] * line[device][1]) / max(1, budget)
            for device, budget in budgets.items()
        }
        counts[min(fill, key=fill.__getitem__)] += 1
    return counts
