"""Limits on torch's reserved memory, within a plan and over a session.

torch keeps the segments of a generation for the next one. Tensors of another length may not fit into them, and then it
takes new ones beside the old. A plan counts each workload in a process that reserves nothing else, so unused segments
are returned to the device before a generation of another shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple
from weakref import WeakSet

import torch

from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.memory.beside import Beside


class _Promise(NamedTuple):
    """The promised memory of one GPU, in bytes.

    Attributes:
        resting: Bytes that the model has allocated between generations.
        reserved: The most that torch reserves for it.
        limited: torch needs a limit. A plan may assume that torch returns segments before it is out of memory. A GPU of
            the budget's size makes torch do so; on a larger GPU the limit does.
    """

    resting: int
    reserved: int
    limited: bool


class Segments:
    """The segments of a loaded model's devices; its methods do nothing outside CUDA.

    Args:
        plan: The plan, with the promised memory.
        devices: The devices of the model, in order.
        beside: Bytes that the process has allocated and that do not belong to the model.
    """

    def __init__(self, plan: Plan, devices: Iterable[torch.device], beside: Beside) -> None:
        self._promises = {device: _promise(plan, device) for device in devices if device.type == "cuda"}
        self._beside = beside
        self._last: Hashable = None
        _OPEN.add(self)

    def close(self) -> None:
        """Stop counting the model, whose memory is free."""
        self._promises.clear()

    @contextmanager
    def within(self, shape: Hashable, *, promised: bool, always: bool = False) -> Iterator[None]:
        """Run a generation within the promise, in the thread that computes it.

        Args:
            shape: Two generations of equal shapes take tensors of the same sizes in the same order.
            promised: The plan covers the generation. Any other one was checked against the budget, and leaves none.
            always: Limit torch also if the plan counts no returned segments, because tensors of many lengths follow.
        """
        self._beside.begin()
        if self._promises and shape != self._last:
            torch.cuda.empty_cache()
        self._last = None  # an interrupted generation leaves segments of any size
        limits = {device: promise.reserved + self._headroom(device) for device, promise in self._promises.items()}
        limited = [device for device, promise in self._promises.items() if promised and (promise.limited or always)]
        with _limited({device: limits[device] for device in limited}):
            yield
        self._last = shape
        if any(torch.cuda.memory_reserved(device) > limit for device, limit in limits.items()):
            torch.cuda.empty_cache()
            self._last = None
        self._beside.end()

    def _headroom(self, device: torch.device) -> int:
        """Return the bytes that do not belong to the model, plus those that other models may still take."""
        others = (one._promises.get(device) for one in set(_OPEN) if one is not self)
        return self._beside.nbytes(device) + sum(other.reserved - other.resting for other in others if other)


_OPEN: WeakSet[Segments] = WeakSet()


def _promise(plan: Plan, device: torch.device) -> _Promise:
    part = plan.estimate.devices.get(device.index, plan.estimate)
    assert plan.budget.vram is not None
    offered = plan.budget.devices.get(device.index, plan.budget.vram)
    most = min(part.process_total, max(offered, part.needed_bytes))
    cache = part.kv_cache if part.profile.captures else 0
    return _Promise(part.weights + part.workspace + cache, most - part.beside_torch, most < part.process_total)


# The limits of running generations, and the caller's limit before the first of them.
_RUNNING: defaultdict[torch.device, list[int]] = defaultdict(list)
_BEFORE: dict[torch.device, float] = {}
_LOCK = Lock()


@contextmanager
def _limited(limits: Mapping[torch.device, int]) -> Iterator[None]:
    """Limit the bytes that torch reserves on devices; a lower limit of the caller stays.

    Models that generate at the same time share the highest limit: each counts the others' promises.
    """
    with _LOCK:
        for device, limit in limits.items():
            if not _RUNNING[device]:
                _BEFORE[device] = _fraction(device)
            _RUNNING[device].append(limit)
            _apply(device)
    try:
        yield
    finally:
        with _LOCK:
            for device, limit in limits.items():
                _RUNNING[device].remove(limit)
                _apply(device)


def _apply(device: torch.device) -> None:
    """Set the highest limit of the running generations, or the caller's limit if none runs."""
    fraction = _BEFORE[device]
    if _RUNNING[device]:
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = min(fraction, max(_RUNNING[device]) / total)
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def _fraction(device: torch.device) -> float:
    """Return the share of the device that torch may reserve now; all of it if torch is too old to tell."""
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if tell is None else float(tell(device))
