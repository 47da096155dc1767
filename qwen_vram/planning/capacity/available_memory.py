"""Free memory of this machine: of GPUs by the driver, of the host by the system."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from qwen_vram.errors import BackendUnavailableError
from qwen_vram.planning.capacity.nvml import driver, text_of, told, visible_handles

_LOGGER = logging.getLogger(__name__)


class DeviceMemory(NamedTuple):
    """One visible GPU: its name, its bytes and its CUDA compute capability, as far as the driver reports them.

    This process takes `used_here` of the bytes; 0 if the driver does not report it.
    """

    name: str
    total: int
    free: int
    used_here: int
    capability: tuple[int, int] | None = None


def visible_gpus() -> list[DeviceMemory]:
    """Return the NVIDIA GPUs that CUDA would show this process, in `CUDA_VISIBLE_DEVICES`' order, or no entries.

    The function asks the driver and makes no CUDA context. Without `CUDA_VISIBLE_DEVICES` the order is the driver's
    (PCI bus). This is CUDA's order too if the GPUs are of one kind or `CUDA_DEVICE_ORDER` is `PCI_BUS_ID`. The list
    ends before the first GPU whose memory the driver does not report.
    """
    found: list[DeviceMemory] = []
    with driver() as pynvml:
        for handle in visible_handles(pynvml) if pynvml else []:
            memory = _memory(pynvml, handle)
            if memory is None:
                break
            found.append(memory)
    return found


def free_vram(number: int | None = None) -> int | None:
    """Return the bytes that one more model may take of a GPU, with its CUDA context; `None` if there is no GPU.

    Memory that this process holds counts as free, except for its live tensors: those of a model that is still bound.

    Args:
        number: CUDA's number of the GPU. `None` is torch's current device if torch runs CUDA in this process already,
            and the first visible GPU otherwise.
    """
    torch = sys.modules.get("torch")  # without it there are neither tensors nor a current device
    if number is None and torch is not None and torch.cuda.is_initialized():
        number = torch.cuda.current_device()
    if number is None:
        card = _first(visible_gpus())
    else:
        assert torch is not None
        card = _card_of(torch, number)
    if card is None:
        return None
    if torch is None:
        return card.free + card.used_here
    live, reserved = torch.cuda.memory_allocated(number or 0), torch.cuda.memory_reserved(number or 0)
    return int(card.free + max(0, max(card.used_here, reserved) - live))


def oldest_capability(numbers: Collection[int]) -> tuple[int, int] | None:
    """The CUDA compute capability of the oldest of some GPUs, by their numbers; `None` if it is not known here.

    Args:
        numbers: CUDA's numbers of the GPUs. Numbers that this machine lacks are ignored. Without any number it is the
            GPU of `free_vram`.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        asked = [number for number in numbers or [torch.cuda.current_device()] if number < torch.cuda.device_count()]
        return min((torch.cuda.get_device_capability(number) for number in asked), default=None)
    cards = visible_gpus()
    found = [cards[number].capability for number in numbers or [0] if number < len(cards)]
    return min((one for one in found if one is not None), default=None)


def _first(cards: list[DeviceMemory]) -> DeviceMemory | None:
    """The first of the visible GPUs. Warns if CUDA may number another one first, which is known only at run time."""
    kinds = {(card.name, card.total) for card in cards}
    if len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        _LOGGER.warning(
            "this machine has GPUs of several kinds, and CUDA numbers the fastest one first; the plan is for %s. Set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID for the order of nvidia-smi, or pass vram",
            cards[0].name,
        )
    return cards[0] if cards else None


def _card_of(torch: Any, number: int) -> DeviceMemory:
    """CUDA's GPU `number`, matched by UUID or PCI bus; torch's figures if the driver's library does not know it."""
    facts = torch.cuda.get_device_properties(number)
    with driver() as pynvml:
        for ask, name in _identities(facts):
            handle = told(pynvml, ask, name)
            memory = None if handle is None else _memory(pynvml, handle)
            if memory is not None:
                return memory
    free, total = torch.cuda.mem_get_info(number)
    return DeviceMemory(facts.name, total, free, 0)


def _identities(facts: Any) -> Iterator[tuple[str, str]]:
    """Functions of NVML that find a GPU, each with torch's name for the GPU."""
    for prefix in ("GPU", "MIG"):
        yield "nvmlDeviceGetHandleByUUID", f"{prefix}-{facts.uuid}"
    if hasattr(facts, "pci_bus_id"):  # older versions of torch lack it
        place = f"{facts.pci_domain_id:08X}:{facts.pci_bus_id:02X}:{facts.pci_device_id:02X}.0"
        yield "nvmlDeviceGetHandleByPciBusId", place


def _memory(pynvml: ModuleType | None, handle: object) -> DeviceMemory | None:
    """A card's memory; `None` if the driver does not report it. WSL reports the memory but not the processes."""
    info = told(pynvml, "nvmlDeviceGetMemoryInfo", handle)
    if info is None:
        return None
    processes = told(pynvml, "nvmlDeviceGetComputeRunningProcesses", handle) or []
    used_here = sum(process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid())
    name = text_of(told(pynvml, "nvmlDeviceGetName", handle)) or "NVIDIA GPU"
    capability = told(pynvml, "nvmlDeviceGetCudaComputeCapability", handle)
    return DeviceMemory(name, info.total, info.free, used_here, capability and (capability[0], capability[1]))


def available_ram() -> int:
    """Return the bytes of host memory available without swapping: the system's figure, or a container's lower limit.

    Raises:
        BackendUnavailableError: neither psutil nor /proc/meminfo reports it.
    """
    free = _system_available()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        return max(0, min(free, limit - used))
    return free


def _system_available() -> int:
    try:
        import psutil
    except ImportError:
        return _meminfo_available()
    return int(psutil.virtual_memory().available)


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        install = "pip install psutil"
        raise BackendUnavailableError(
            f"cannot tell how much host memory is free; pass ram='16GiB' or the like, or run: {install}",
            backend="psutil",
            install=install,
        ) from None


def _cgroup(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
