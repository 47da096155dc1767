"""Comparison of an estimate with the memory of a budget's devices and host."""

from __future__ import annotations

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.planning.capacity.budget import Budget


def needed(result: Estimate, budget: Budget) -> int:
    """Bytes needed on the hardware of the plan: the process on all GPUs, or weights and live tensors on the host."""
    if budget.vram is None:
        return result.weights + result.kv_cache + result.activations + result.host
    return result.needed_bytes


def needs_less(result: Estimate, budget: Budget, than: int) -> bool:
    """Tell if `needed` is less than `than`. On one GPU it is faster than the comparison."""
    if budget.vram is None or result.devices:
        return needed(result, budget) < than
    return result.needs_at_most(than - 1)


def by_device(result: Estimate, budget: Budget) -> dict[int, tuple[int, int]]:
    """Bytes that each of several GPUs needs, and bytes that it offers; empty for one GPU."""
    return {device: (part.needed_bytes, budget.devices[device]) for device, part in result.devices.items()}


def fits(result: Estimate, budget: Budget) -> bool:
    """Tell if the estimate fits both the devices and the host."""
    if budget.vram is None:
        return needed(result, budget) <= budget.ram
    return result.host <= budget.ram and on_device(result, budget)


def on_device(result: Estimate, budget: Budget) -> bool:
    """Tell if the estimate fits the GPU, or each of several; the host is not checked."""
    if result.devices:
        return all(_holds(budget.devices[device], part) for device, part in result.devices.items())
    assert budget.vram is not None
    return _holds(budget.vram, result)


def live_bytes(part: Estimate) -> int:
    """The least bytes that one device needs, without a replay, which takes most of an estimate's time."""
    return part.weights + part.kv_cache + part.tensors + part.workspace


def _holds(limit: int, part: Estimate) -> bool:
    return live_bytes(part) <= limit and part.needs_at_most(limit)
