"""A sample of this machine: GPUs, processes, the host, and the plans of loaded models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from types import ModuleType
from typing import Any

import psutil

from qwen_vram.checkpoints.running_plans import read_all
from qwen_vram.planning.capacity.available_memory import available_ram
from qwen_vram.planning.capacity.nvml import driver, text_of, told, uuid_of, visible_handles

_HIDDEN = "?"


@dataclass(frozen=True)
class ProcessUse:
    """A process on a GPU.

    Attributes:
        pid: Its number; in a container it may be the host's.
        name: The name of its program; "?" if it is not visible here.
        used: Bytes by the driver; `None` if the driver does not tell (WSL).
    """

    pid: int
    name: str
    used: int | None


@dataclass(frozen=True)
class GpuUse:
    """A GPU at one moment; fields that the driver does not tell are `None`.

    Attributes:
        uuid: The driver's name of the GPU or MIG instance, which no environment variable changes.
        total, used, free: Bytes.
        utilization: Percent of the last period in which a kernel ran.
        power: Watts.
        temperature: Degrees Celsius.
        processes: Those with a CUDA context.
    """

    uuid: str
    name: str
    total: int
    used: int
    free: int
    utilization: int | None = None
    power: float | None = None
    temperature: int | None = None
    processes: tuple[ProcessUse, ...] = ()


@dataclass(frozen=True)
class HostUse:
    """The host's memory in bytes: all of it, and what is available without swapping."""

    total: int
    available: int


@dataclass(frozen=True)
class PlanUse:
    """A model that a process of this machine loaded with this library.

    Attributes:
        pid: The process.
        model: The model as it was named.
        call: The `load` call that repeats the plan.
        uuids: The GPUs it is on, by CUDA's UUIDs, which lack the driver's "GPU-" or "MIG-"; empty on the CPU.
        promised: Bytes by part, as in `Estimate`: the most in any generation that the plan covers. On the CPU it has
            the parts that are tensors.
        measured: Bytes by part of the last generation, summed over GPUs; only `weights` before the first one.
        generations: The number of generations so far.
        used: Bytes that its process takes on these GPUs now, or its resident set on the CPU; `None` if unknown.
    """

    pid: int
    model: str
    call: str
    uuids: tuple[str, ...]
    promised: dict[str, int]
    measured: dict[str, int]
    generations: int
    used: int | None

    @property
    def total(self) -> int | None:
        """Bytes that the process may take on its GPUs; `None` on the CPU, where a plan counts tensors alone."""
        return self.promised.get("process_total")


@dataclass(frozen=True)
class Sample:
    """The state of this machine at one moment.

    Attributes:
        time: Local time with its offset, as ISO 8601.
        gpus: The GPUs that CUDA shows; empty without an NVIDIA driver.
        host: The host's memory.
        plans: Models that are loaded with this library.
        driver: There is an NVIDIA driver.
    """

    time: str
    gpus: tuple[GpuUse, ...]
    host: HostUse
    plans: tuple[PlanUse, ...] = field(default=())
    driver: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """Return the sample of which `to_dict` gave `data`."""
        gpus = tuple(
            GpuUse(**{**gpu, "processes": tuple(ProcessUse(**one) for one in gpu["processes"])}) for gpu in data["gpus"]
        )
        plans = tuple(PlanUse(**{**plan, "uuids": tuple(plan["uuids"])}) for plan in data["plans"])
        return cls(data["time"], gpus, HostUse(**data["host"]), plans, data["driver"])


def take() -> Sample:
    """Return a sample of this moment. It asks the driver and makes no CUDA context."""
    time = datetime.now(timezone.utc).astimezone().isoformat(timespec="milliseconds")
    with driver() as pynvml:
        gpus = tuple(_gpus(pynvml)) if pynvml else ()
        known = pynvml is not None
    host = HostUse(int(psutil.virtual_memory().total), available_ram())
    return Sample(time, gpus, host, tuple(_plan(facts, gpus) for facts in read_all()), known)


def _gpus(pynvml: ModuleType) -> list[GpuUse]:
    found = []
    for handle in visible_handles(pynvml):
        memory = told(pynvml, "nvmlDeviceGetMemoryInfo", handle)
        if memory is None:
            continue
        rates = told(pynvml, "nvmlDeviceGetUtilizationRates", handle)
        power = told(pynvml, "nvmlDeviceGetPowerUsage", handle)
        heat = told(pynvml, "nvmlDeviceGetTemperature", handle, getattr(pynvml, "NVML_TEMPERATURE_GPU", 0))
        found.append(
            GpuUse(
                uuid=uuid_of(pynvml, handle),
                name=text_of(told(pynvml, "nvmlDeviceGetName", handle)) or "NVIDIA GPU",
                total=int(memory.total),
                used=int(memory.used),
                free=int(memory.free),
                utilization=None if rates is None else int(rates.gpu),
                power=None if power is None else power / 1000,
                temperature=None if heat is None else int(heat),
                processes=tuple(_processes(pynvml, handle)),
            )
        )
    return found


def _processes(pynvml: ModuleType, handle: object) -> list[ProcessUse]:
    entries = told(pynvml, "nvmlDeviceGetComputeRunningProcesses", handle) or []
    found = [ProcessUse(int(one.pid), _name(int(one.pid)), _bytes(one.usedGpuMemory)) for one in entries]
    return sorted(found, key=lambda one: -(one.used or 0))


def _bytes(used: int | None) -> int | None:
    """The driver's figure; NVML marks a figure that it does not have by all bits set."""
    return None if used is None or used >= 2**63 else int(used)


def _name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return _HIDDEN


def _plan(facts: dict[str, Any], gpus: tuple[GpuUse, ...]) -> PlanUse:
    uuids, pid = tuple(facts["uuids"]), int(facts["pid"])
    return PlanUse(
        pid=pid,
        model=facts["model"],
        call=facts["call"],
        uuids=uuids,
        promised=facts["promised"],
        measured=facts["measured"],
        generations=facts["generations"],
        used=_used(pid, uuids, gpus),
    )


def _used(pid: int, uuids: tuple[str, ...], gpus: tuple[GpuUse, ...]) -> int | None:
    """Bytes of a process on its GPUs. If process numbers are hidden, one process alone on a GPU is taken for it."""
    if not uuids:
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return None
    found = []
    for gpu in gpus:
        if gpu.uuid.partition("-")[2] in uuids:
            own = [one.used for one in gpu.processes if one.pid == pid]
            hidden = [one.used for one in gpu.processes if one.name == _HIDDEN]
            used = own or (hidden if len(gpu.processes) == len(hidden) == 1 else [])
            found.append(used[0] if used else None)
    known = [used for used in found if used is not None]
    return sum(known) if known and len(known) == len(found) else None
