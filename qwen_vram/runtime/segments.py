"""Keep the memory that torch's allocator reserves within a plan, over a session of generations.

torch keeps the segments of a generation for the next one. Tensors of another length may not fit into them, and then it
takes new ones beside the old. A plan counts each workload in a process that reserves nothing else, so unused segments
are returned to the device before a generation of another shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from qwen_vram.planning.planner import Plan


class _Promise(NamedTuple):
    """What one GPU was promised, in bytes.

    Attributes:
        resting: What the model has allocated between generations.
        reserved: The most that torch reserves for it.
        limited: Torch must be told. A plan may count on segments that torch returns before it is out of memory. A card
            of the budget's size makes torch do so; on a larger card a limit does.
    """

    resting: int
    reserved: int
    limited: bool


class Segments:
    """The segments of a loaded model's devices; all calls change nothing off CUDA.

    Args:
        plan: What was promised.
        devices: The devices of the model, in order.
    """

    def __init__(self, plan: Plan, devices: Iterable[torch.device]) -> None:
        self._promises = {device: _promise(plan, device) for device in devices if device.type == "cuda"}
        self._last: Hashable = None

    @contextmanager
    def within_promise(self, shape: Hashable) -> Iterator[None]:
        """Run a generation within the promise.

        Args:
            shape: Two generations of equal shapes take tensors of the same sizes in the same order.
        """
        if self._promises and shape != self._last:
            torch.cuda.empty_cache()
        self._last = None  # an interrupted generation leaves segments of any size
        others = {device: _held_by_others(device, promise) for device, promise in self._promises.items()}
        with _limited(
            {device: promise.reserved + others[device] for device, promise in self._promises.items() if promise.limited}
        ):
            yield
        self._last = shape
        if any(
            torch.cuda.memory_reserved(device) > promise.reserved + others[device]
            for device, promise in self._promises.items()
        ):
            torch.cuda.empty_cache()
            self._last = None


def _promise(plan: Plan, device: torch.device) -> _Promise:
    part = plan.estimate.devices.get(device.index, plan.estimate)
    assert plan.budget.vram is not None
    offered = plan.budget.devices.get(device.index, plan.budget.vram)
    most = min(part.process_total, max(offered, part.needed_bytes))
    return _Promise(part.weights + part.workspace, most - part.beside_torch, most < part.process_total)


def _held_by_others(device: torch.device, promise: _Promise) -> int:
    """Return the bytes of tensors on the device that are not the model's, such as another model's."""
    return max(0, torch.cuda.memory_allocated(device) - promise.resting)


@contextmanager
def _limited(limits: Mapping[torch.device, int]) -> Iterator[None]:
    """Limit the bytes that torch reserves on devices; a lower limit of the caller's stays."""
    before = {device: _fraction(device) for device in limits}
    try:
        for device, fraction in before.items():
            limit = limits[device] / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(fraction, limit), device)
        yield
    finally:
        for device, fraction in before.items():
            torch.cuda.set_per_process_memory_fraction(fraction, device)


def _fraction(device: torch.device) -> float:
    """Return the share of the device that torch may reserve now; all of it if torch is too old to tell."""
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if tell is None else float(tell(device))
