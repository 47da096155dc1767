"""The devices that a model is loaded on, and the check of their free memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from qwen_vram.errors import BackendUnavailableError, UnknownNameError
from qwen_vram.planning.capacity.budget import FREE_RESERVE, Budget, VramLike, by_device, size_of
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.measure import process_bytes
from qwen_vram.units import format_gib

_LOGGER = logging.getLogger(__name__)


def devices_for(device: str | None, vram: VramLike) -> list[torch.device]:
    """Return the devices to load on: the GPUs that `vram` names or the current one, the CPU for `{}`, or `device`.

    Raises:
        UnknownNameError: an unknown device.
        BackendUnavailableError: a GPU is missing.
        UnitError: `vram` is no size, or a dict with other keys than device numbers.
    """
    if device not in (None, "cpu", "cuda"):
        raise UnknownNameError("device", device, ("cuda", "cpu"))
    size = size_of(vram)
    wanted = device == "cuda" or (device is None and size is not None)
    without = device == "cpu" or (device is None and vram is not None and size is None)
    if torch.cuda.is_available() and not without:
        numbers = list(by_device(vram)) or [torch.cuda.current_device()]
        _check_numbers(numbers)
        return [torch.device("cuda", number) for number in numbers]
    if wanted:
        asked = f"vram={vram!r}" if device is None else f"device={device!r}"
        raise BackendUnavailableError(
            f"{asked} asks for a GPU, and torch sees none here; leave it out to load on the CPU, or install a torch "
            "built for CUDA",
            backend="cuda",
        )
    return [torch.device("cpu")]


def working_device(device: str | None) -> torch.device:
    """Return the device for arithmetic on files: `device`, or by default the GPU if there is one.

    Raises:
        UnknownNameError: an unknown device.
        BackendUnavailableError: the GPU is missing.
    """
    if device not in (None, "cpu", "cuda"):
        raise UnknownNameError("device", device, ("cuda", "cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "device='cuda' asks for a GPU, and torch sees none here; leave it out to work on the CPU, or install a "
            "torch built for CUDA",
            backend="cuda",
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _check_numbers(numbers: list[int]) -> None:
    count = torch.cuda.device_count()
    missing = [str(number) for number in numbers if number >= count]
    if missing:
        raise BackendUnavailableError(
            f"vram names GPU {' and '.join(missing)}, and torch sees {count} here, numbered from 0; name those, or "
            "check CUDA_VISIBLE_DEVICES",
            backend="cuda",
        )


def budget_on(devices: list[torch.device], vram: VramLike, ram: str | int | None, reserve: str | int | None) -> Budget:
    """Return the budget of a model for these devices; without a `vram`, the free memory of the GPU for the model.

    It logs a line if live tensors of this process, such as an earlier model, take memory of that GPU.

    Raises:
        UnitError: as for `Budget.of`.
    """
    device = devices[0]
    if device.type == "cpu":
        return Budget.of({}, ram, reserve)
    budget = Budget.of(vram, ram, reserve, held=held_beside_torch(devices), number=device.index)
    budget = replace(budget, capability=torch.cuda.get_device_capability(weakest(devices)))
    held = torch.cuda.memory_allocated(device)
    if vram is None and held > FREE_RESERVE:
        _LOGGER.warning(
            "this process already holds %s in tensors on GPU %d, such as a model that was loaded before; the plan is "
            "for the %s beside them. To plan for the whole GPU, call close() on that model first",
            format_gib(held),
            device.index,
            format_gib((budget.vram or 0) + budget.reserve),
        )
    return budget


def weakest(devices: list[torch.device]) -> torch.device:
    """Return the device with the oldest compute capability, which determines what all devices can run."""
    return devices[0] if len(devices) == 1 else min(devices, key=torch.cuda.get_device_capability)


def held_beside_torch(devices: Sequence[torch.device]) -> dict[int, int]:
    """Return the bytes of each GPU that this process takes beside torch's memory, by the GPU's number.

    They are the CUDA context, and kernels and streams of models that were loaded before. A GPU without a CUDA context,
    or whose driver does not tell, is left out.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    found = {}
    for device in devices:
        taken = process_bytes(device) if device.type == "cuda" and torch.cuda.memory_reserved(device) else None
        if taken is not None:
            found[device.index] = max(0, taken - torch.cuda.memory_reserved(device))
    return found


def check_free(chosen: Plan, devices: list[torch.device]) -> None:
    """Compare a plan with the memory that is free now, which may be less than its budget.

    Asking the driver creates the CUDA context, which the plan counts, so it is not required again.

    Raises:
        DoesNotFitError: other processes, or other tensors of this one, leave too little.
    """
    for device in devices:
        if device.type != "cuda":
            continue
        part = chosen.estimate.devices.get(device.index, chosen.estimate)
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = free + unused + max(part.held, part.machine.cuda_context)
        if part.needed_bytes > available:
            raise DoesNotFitError(
                f"{chosen.estimate.model} needs {format_gib(part.needed_bytes)} of GPU {device.index}, and of its "
                f"{format_gib(total)} only {format_gib(available)} are free now: {_holders(device)}, or pass "
                f"vram={available} to plan for what is free",
                needed_bytes=part.needed_bytes,
                budget_bytes=available,
                estimate=part,
                nearest=None,
            )


def _holders(device: torch.device) -> str:
    """Return who holds the rest of a GPU's memory, and how to free it."""
    held = torch.cuda.memory_allocated(device)
    if held <= FREE_RESERVE:
        return "other processes hold the rest; end them"
    return (
        f"tensors of this process hold {format_gib(held)}; if they are a model that was loaded before, call close() "
        "on it"
    )
