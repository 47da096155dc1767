"""Comparison of an estimate with the memory of a budget's devices and host."""

from __future__ import annotations

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.planning.capacity.budget import Budget


def needed(result: Estimate, budget: Budget) -> int:
    """Bytes needed on what the plan runs on: the process on all GPUs, or weights and live tensors on the host."""
    if budget.vram is None:
        return result.weights + result.kv_cache + result.activations + result.host
    return result.needed_bytes


def by_device(result: Estimate, budget: Budget) -> dict[int, tuple[int, int]]:
    """What each of several GPUs needs, and what it offers; empty for one."""
    return {device: (part.needed_bytes, budget.devices[device]) for device, part in result.devices.items()}


def fits(result: Estimate, budget: Budget) -> bool:
    """Tell if both the devices and the host hold it."""
    if budget.vram is None:
        return needed(result, budget) <= budget.ram
    return result.host <= budget.ram and on_device(result, budget)


def on_device(result: Estimate, budget: Budget) -> bool:
    """Tell if the GPU holds its part, or each of several does, whatever the host offers."""
    if result.devices:
        return all(_holds(budget.devices[device], part) for device, part in result.devices.items())
    assert budget.vram is not None
    return _holds(budget.vram, result)


def live_bytes(part: Estimate) -> int:
    """What one device needs at least, without a replay, which takes most of an estimate's time."""
    return part.weights + part.kv_cache + part.tensors + part.workspace


def _holds(room: int, part: Estimate) -> bool:
    return live_bytes(part) <= room and part.needs_at_most(room)
