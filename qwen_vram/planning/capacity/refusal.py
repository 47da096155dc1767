"""Refusals: the device or host that lacks memory for a plan, in words and bytes."""

from __future__ import annotations

from typing import NamedTuple

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.planning.capacity.fit import by_device, needed, on_device
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.workload import Workload
from qwen_vram.units import format_gib


class Shortage(NamedTuple):
    """Needed and allowed memory in words, the bytes of the device or host that lacks most, and each GPU's of several.

    It is the host if there is no GPU, or if the GPUs hold their parts.
    """

    needs: str
    allowed: str
    needed_bytes: int
    budget_bytes: int
    devices: dict[int, tuple[int, int]]


def shortage(result: Estimate, budget: Budget) -> Shortage:
    """Compare the memory that `result` needs with the memory that `budget` offers."""
    devices = by_device(result, budget)
    if budget.vram is None:
        return _of_one(needed(result, budget), budget.ram, "of host memory", devices)
    if on_device(result, budget):
        return _of_one(result.host, budget.ram, "of host memory", devices)
    if not devices:
        return _of_one(result.needed_bytes, budget.vram, "on the GPU, CUDA context included", devices)
    most, limit = max(devices.values(), key=lambda pair: pair[0] / max(1, pair[1]))
    each = " and ".join(f"{format_gib(need)} on GPU {device}" for device, (need, _) in devices.items())
    allowed = " and ".join(format_gib(offered) for _, offered in devices.values())
    return Shortage(f"{each}, CUDA contexts included", allowed, most, limit, devices)


def _of_one(need: int, limit: int, where: str, devices: dict[int, tuple[int, int]]) -> Shortage:
    return Shortage(f"{format_gib(need)} {where}", format_gib(limit), need, limit, devices)


def refusal(smallest: Estimate, budget: Budget, nearest: Workload | None) -> DoesNotFitError:
    """The error for a search that found nothing: its smallest candidate, and a workload that would fit."""
    short, work = shortage(smallest, budget), smallest.workload
    advice = (
        f"prompt_len={nearest.prompt_len} with max_new_tokens={nearest.max_new_tokens} and "
        f"batch_size={nearest.batch_size} would fit"
        if nearest
        else "not even one token would fit; offer more, set fewer knobs yourself, or use a smaller model"
    )
    if budget.vram is None or on_device(smallest, budget):
        advice += _on_disk(smallest)
    return DoesNotFitError(
        f"{smallest.model} with {smallest.profile.weights} weights at {work.prompt_len} + {work.max_new_tokens} "
        f"tokens, batch {work.batch_size}, needs {short.needs}; {short.allowed} are allowed; {advice}",
        needed_bytes=short.needed_bytes,
        budget_bytes=short.budget_bytes,
        estimate=smallest,
        nearest=nearest,
        devices=short.devices,
    )


def _on_disk(result: Estimate) -> str:
    """Advice by which layers made from a plain checkpoint's could stay on the disk; empty for other checkpoints."""
    architecture, weights = result.architecture, result.profile.weights
    if architecture is None or architecture.stored_format is not None:
        return ""
    if FORMATS[weights].is_bnb:
        return "; once the checkpoint is quantized (qwen-vram quantize), its layers can stay on the disk"
    if FORMATS[weights].is_dense and weights != architecture.dtype:
        return f"; in {architecture.dtype}, as the files hold them, layers can stay on the disk"
    return ""
