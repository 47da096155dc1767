"""What this machine offers now: free device memory from the driver (nvidia-ml-py), free host memory from the system."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from qwen_vram.errors import BackendUnavailableError


class DeviceMemory(NamedTuple):
    """One visible GPU: its name and its bytes, `used_here` of them by this process."""

    name: str
    total: int
    free: int
    used_here: int


def visible_gpus() -> list[DeviceMemory]:
    """The NVIDIA GPUs that CUDA would show this process, in `CUDA_VISIBLE_DEVICES`' order; empty where there is none.

    Reads the driver and makes no CUDA context. Without `CUDA_VISIBLE_DEVICES` the order is the driver's (PCI bus),
    which is CUDA's too where the GPUs are of one kind or `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    """
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_memory(pynvml, handle) for handle in _handles(pynvml)]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _handles(pynvml: ModuleType) -> list[object]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = pynvml.nvmlDeviceGetCount()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    handles = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit():
            handles.append(pynvml.nvmlDeviceGetHandleByIndex(int(entry)))
        elif entry.startswith(("GPU-", "MIG-")):
            handles.append(pynvml.nvmlDeviceGetHandleByUUID(entry))
        else:
            break  # CUDA ignores what follows an invalid entry, "-1" among them.
    return handles


def _memory(pynvml: ModuleType, handle: object) -> DeviceMemory:
    info = pynvml.nvmlDeviceGetMemoryInfo(handle)
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    used_here = sum(process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid())
    name = pynvml.nvmlDeviceGetName(handle)
    return DeviceMemory(name if isinstance(name, str) else name.decode(), info.total, info.free, used_here)


def available_ram() -> int:
    """Bytes of host memory that can be had without swapping: the system's figure, or the container's limit if lower.

    Raises:
        BackendUnavailableError: neither psutil nor /proc/meminfo tells.
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
