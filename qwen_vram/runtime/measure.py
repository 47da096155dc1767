"""Measured memory of a loaded model, part by part, compared with the prediction."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.runtime.backends.base import Backend
from qwen_vram.runtime.offload.host_embedding import HostEmbedding
from qwen_vram.runtime.report_times import ReportedTimes
from qwen_vram.units import format_bytes

PARTS = (
    "weights",
    "kv_cache",
    "activations",
    "workspace",
    "peak_allocated",
    "peak_reserved",
    "process_total",
    "load_peak",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Predicted and measured memory, part by part, of the last generation, or of the load before the first one.

    Attributes:
        estimate: The prediction for the workload that ran.
        measured: Bytes by part; a part that cannot be measured here (peaks on the CPU) is absent.
        devices: The report of each of several GPUs, by its number; the parts above are then sums.
        times: Times of the last generation; `None` before the first.
    """

    estimate: Estimate
    measured: dict[str, int]
    devices: Mapping[int, Report] = field(default_factory=dict)
    times: ReportedTimes | None = None

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        measured: Mapping[torch.device, dict[str, int]],
        times: ReportedTimes | None = None,
    ) -> Report:
        """Return the report of the measured bytes of each device, with the estimate of its part."""
        if not estimate.devices:
            (alone,) = measured.values()
            return cls(estimate=estimate, measured=alone, times=times)
        devices = {
            device.index: cls(estimate=estimate.devices[device.index], measured=found)
            for device, found in measured.items()
        }
        every = list(measured.values())
        sums = {part: sum(found[part] for found in every) for part in PARTS if all(part in found for found in every)}
        return cls(estimate=estimate, measured=sums, devices=devices, times=times)

    def lines(self) -> Iterator[tuple[str, int, int | None]]:
        """Yield part, predicted bytes, and measured bytes or `None`."""
        for part in PARTS:
            yield part, getattr(self.estimate, part), self.measured.get(part)

    def to_dict(self) -> dict[str, Any]:
        """Return predicted and measured bytes by part, as plain data, with each of several GPUs under `devices`.

        The last generation's milliseconds are under `times`.
        """
        parts: dict[str, Any] = {
            part: {"predicted": predicted, "measured": measured} for part, predicted, measured in self.lines()
        }
        if self.times is not None:
            parts["times"] = self.times.to_dict()
        each = {device: one.to_dict() for device, one in self.devices.items()}
        return {**parts, "devices": each} if each else parts

    def __str__(self) -> str:
        """Return a table with the error of each prediction; parts that were not measured are left out."""
        rows = [f"{'':15}{'predicted':>16}{'measured':>16}{'':>12}{'error':>9}"]
        unmeasured = []
        for part, predicted, measured in self.lines():
            if measured is None:
                unmeasured.append(part)
                continue
            error = f"{(predicted - measured) / measured:+.2%}" if measured else "-"
            rows.append(f"{part:15}{predicted:>16,}{measured:>16,}{format_bytes(measured):>12}{error:>9}")
        if self.times is not None:
            rows.extend(self.times.lines())
        if unmeasured:
            rows.append(f"not measured (peaks need a GPU and a generation): {', '.join(unmeasured)}")
        for device, one in self.devices.items():
            rows.append(f"GPU {device}\n{one}")
        return "\n".join(rows)


def weight_storages(model: nn.Module, backend: Backend, device: torch.device | None = None) -> dict[str, int]:
    """Return the bytes of every weight's storages by its name in the checkpoint, with quantization state.

    If `device` is given, only storages on it are counted.
    A tensor that two modules share is counted under its first name. Embeddings on the host are left out, and buffers
    that are not weights (rotary frequencies) too.
    """
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        tensors = {name: [parameter.data] for name, parameter in module.named_parameters(recurse=False)}
        beside = backend.storages(module) if next(module.children(), None) is None else []
        if beside:  # the whole weight, if a format keeps all of it in buffers
            tensors.setdefault("weight", []).extend(beside)
        for name, parts in tensors.items():
            size = 0
            for tensor in parts:
                storage = tensor.untyped_storage()
                if (device is None or tensor.device == device) and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    size += storage.nbytes()
            if size:
                sizes[f"{module_name}.{name}"] = size
    return sizes


def host_bytes(model: nn.Module) -> int:
    """Return the bytes of embeddings that stay on the host."""
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, HostEmbedding))


class PeakMeter:
    """Meter of this process's device memory between `start()` and `stop()`; it measures nothing outside CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.before = 0

    def start(self) -> None:
        """Reset earlier peaks and note the allocated bytes."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def stop(self) -> dict[str, int]:
        """Return peak allocated and reserved bytes, and the process memory if the driver tells; empty outside CUDA."""
        if not self.cuda:
            return {}
        torch.cuda.synchronize(self.device)
        found = {
            "peak_allocated": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved": torch.cuda.max_memory_reserved(self.device),
        }
        process = process_bytes(self.device)
        return found if process is None else {**found, "process_total": process}

    def allocated(self) -> int:
        """Return the bytes allocated now."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0


def process_bytes(device: torch.device) -> int | None:
    """Return the memory of this process on `device` by nvidia-smi; `None` if the driver does not tell.

    If process numbers are hidden (containers), the GPU's total is used if at most one process is on it.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver: nothing to measure with
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        for process in processes:
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) if len(processes) <= 1 else None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
