"""Facts of a machine that checks read: GPUs, links, host memory, libraries and settings."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from qwen_vram.checkpoints.cpu_info import cpu_name, has_4bit_kernel
from qwen_vram.planning.capacity.available_memory import available_ram, visible_gpus
from qwen_vram.planning.capacity.nvml import driver, text_of, told, visible_handles

# Packages whose versions a report shows.
PACKAGES = (
    "qwen-vram", "torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "peft", "gptqmodel", "torchao",
    "triton", "kernels", "flash-attn", "flash-linear-attention", "causal-conv1d", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)  # fmt: skip
# Variables that change memory or time of torch on a GPU.
VARIABLES = (
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
)  # fmt: skip
# Compilers that Triton uses if CC does not name one. Source: Triton 3.6, python/triton/runtime/build.py (_build).
_COMPILERS = ("clang", "gcc")
# Bytes that are copied to measure the rate of host memory.
_COPIED = 2**26


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One visible GPU; fields that the driver does not tell are `None`.

    Attributes:
        name: Its product name.
        total, free: Bytes.
        used_here: Bytes that this process takes.
        capability: CUDA's compute capability.
        width, width_max: Lanes of the PCIe link now, and the most that GPU and board allow.
        generation, generation_max: PCIe generation of the link, likewise. An idle link may use a lower generation.
    """

    name: str
    total: int
    free: int
    used_here: int = 0
    capability: tuple[int, int] | None = None
    width: int | None = None
    width_max: int | None = None
    generation: int | None = None
    generation_max: int | None = None


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """A machine as the checks see it.

    Attributes:
        system: The operating system with its release.
        python: The version of Python.
        cpu: The CPU's name.
        cores: Its logical cores.
        ram_total, ram_available: Bytes of host memory; available is without swapping, within a container's limit.
        swapped: Bytes of this process that are swapped out.
        memlock: Bytes that a process may lock; `None` without a limit.
        is_wsl: It is a virtual machine of the Windows Subsystem for Linux.
        gpus: The GPUs that CUDA shows.
        driver: The NVIDIA driver's version; empty without one.
        versions: Installed versions of `PACKAGES` by name; a package that is not installed is absent.
        settings: The variables of `VARIABLES` that are set.
        has_compiler: There is a C compiler that Triton can use.
        has_4bit_kernel: The CPU is not known to lack bitsandbytes' kernel for 4-bit weights.
        host_rate: Bytes a second of a copy within host memory by one thread, read plus written; measured.
        pinned_rate, unpinned_rate: Bytes a second from host memory to the GPU; `None` if not measured.
    """

    system: str
    python: str
    cpu: str
    cores: int
    ram_total: int
    ram_available: int
    swapped: int = 0
    memlock: int | None = None
    is_wsl: bool = False
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    has_compiler: bool = True
    has_4bit_kernel: bool = True
    host_rate: float = 0.0
    pinned_rate: float | None = None
    unpinned_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`."""
        return asdict(self)

    def release(self, package: str) -> tuple[int, ...] | None:
        """Return the numbers of an installed version, such as `(2, 9, 1)`; `None` if it is not installed."""
        text = self.versions.get(package)
        return None if text is None else numbers_of(text)


def numbers_of(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    >>> numbers_of("2.13.0+cpu"), numbers_of("5.24.0.dev0")
    ((2, 13, 0), (5, 24, 0))
    """
    found: list[int] = []
    for part in text.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)


def examine_machine(*, measure: bool = False) -> MachineFacts:
    """Return the facts of this machine. It makes a CUDA context only if `measure` is true.

    Args:
        measure: Time copies from host memory to the GPU; it needs torch with a GPU, and is ignored otherwise.
    """
    gpus, driver_version = _gpus()
    pinned, unpinned = copy_rates() if measure and gpus else (None, None)
    return MachineFacts(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=cpu_name(),
        has_4bit_kernel=has_4bit_kernel(),
        cores=os.cpu_count() or 1,
        ram_total=int(psutil.virtual_memory().total),
        ram_available=available_ram(),
        swapped=_swapped(),
        memlock=_memlock(),
        is_wsl="microsoft" in platform.release().lower(),
        gpus=gpus,
        driver=driver_version,
        versions=_versions(),
        settings={name: os.environ[name] for name in VARIABLES if name in os.environ},
        has_compiler=_has_compiler(),
        host_rate=_host_rate(),
        pinned_rate=pinned,
        unpinned_rate=unpinned,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _has_compiler() -> bool:
    named = os.environ.get("CC")
    return any(shutil.which(name) is not None for name in ([named] if named else _COMPILERS))


def _memlock() -> int | None:
    """The soft limit of locked memory; `None` if there is no limit, or if the process may exceed it."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or _may_lock_all() else soft


def _may_lock_all() -> bool:
    """Tell if the process has CAP_IPC_LOCK, which exempts it from the limit. Source: capabilities(7), bit 14."""
    found = _status("CapEff")
    return found is not None and bool(int(found, 16) >> 14 & 1)


def _swapped() -> int:
    found = _status("VmSwap")
    return 0 if found is None else int(found.split()[0]) * 1024


def _status(name: str) -> str | None:
    """A field of this process in /proc; `None` if the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), None)


def _host_rate() -> float:
    """Bytes a second of a copy within host memory, read plus written: the best of three."""
    source, target = bytearray(_COPIED), bytearray(_COPIED)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - start)
    return 2 * _COPIED / best


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """The visible GPUs with their links, and the driver's version."""
    found = []
    with driver() as pynvml:
        if pynvml is None:
            return (), ""
        handles = visible_handles(pynvml)
        for card, handle in zip(visible_gpus(), handles):  # noqa: B905 - the memory of later GPUs may be unknown
            found.append(Gpu(**card._asdict(), **_link(pynvml, handle)))
        return tuple(found), text_of(told(pynvml, "nvmlSystemGetDriverVersion"))


def _link(pynvml: ModuleType, handle: object) -> dict[str, Any]:
    asks = {
        "width": "nvmlDeviceGetCurrPcieLinkWidth",
        "width_max": "nvmlDeviceGetMaxPcieLinkWidth",
        "generation": "nvmlDeviceGetCurrPcieLinkGeneration",
        "generation_max": "nvmlDeviceGetMaxPcieLinkGeneration",
    }
    return {name: told(pynvml, ask, handle) or None for name, ask in asks.items()}


def copy_rates() -> tuple[float | None, float | None]:
    """Return bytes a second to the GPU from pinned and from other host memory; `None` without torch or a GPU."""
    try:
        from qwen_vram.diagnosis.copies import rates
    except ImportError:
        return None, None
    return rates()
