"""Checks of GPUs: settings of allocator and CUDA, the link, and other processes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes, of_ms
from qwen_vram.units import format_bytes

# Milliseconds that each setting adds to a decode step, for each decoder layer that Python launches. Eight layers of
# Qwen2.5-7B's shape took 6.15 ms. With CUDA_LAUNCH_BLOCKING they took 11.0 to 12.4, and without caching 12.4 to 12.5.
# measured: NVIDIA H200, driver 580, torch 2.11.0+cu130, transformers 5.17.0, 2026-12-01; rounded down.
_BLOCKING_MS = 0.60
_NO_CACHING_MS = 0.78
# Memory outside of torch's was 1,879,900,160 bytes with CUDA_MODULE_LOADING=EAGER, and 728,563,712 without.
# measured: as above.
_EAGER_MODULES = 1_151_336_448
# Bytes a second of one PCIe lane by generation. Source: PCI-SIG; 128b/130b coding from generation 3 on.
_LANE_RATES = {1: 250e6, 2: 500e6, 3: 984.6e6, 4: 1969.2e6, 5: 3938.5e6, 6: 7563e6}
# A link whose measured copies are slower than this share of its nominal rate is reported. An H200's copies of pinned
# memory ran at 55.1 of 63.0 GB/s, 87 %.
# measured: as above.
_SLOW_LINK = 0.6
# Share of a GPU that other processes may hold without a finding.
_OTHERS = 0.05
_ON = ("1", "true", "yes", "on")


def check_fragments(subject: Subject) -> Iterator[Finding]:
    """Find fragments that expandable segments avoid."""
    machine = subject.machine
    if not machine.gpus or machine.is_wsl or "expandable_segments:True" in allocator_setting(subject):
        return
    found = subject.estimate()
    cost = found.peak_reserved - found.peak_allocated
    if subject.is_worth(cost) and not subject.model.is_planned:
        yield of_bytes(
            "allocator-fragments",
            cost,
            of=subject.own,
            found=f"torch reserves {format_bytes(found.peak_reserved)} for {format_bytes(found.peak_allocated)} of "
            "tensors, by the replay of its allocator",
            cost="of fragments and cached blocks at the peak",
            fix="export PYTORCH_ALLOC_CONF=expandable_segments:True",
        )


def check_rounding(subject: Subject) -> Iterator[Finding]:
    """Find sizes that the allocator rounds up to a part of a power of two."""
    divisions = re.search(r"roundup_power2_divisions:(\d+)", allocator_setting(subject))
    if not subject.machine.gpus or not divisions:
        return
    parts = int(divisions[1])
    if parts < 1:
        return
    sizes = [one.nbytes for one in subject.model.matrices]
    cost = sum(_rounded(size, parts) - size for size in sizes)
    if subject.matters(cost):
        yield of_bytes(
            "allocator-rounding",
            cost,
            of=subject.own,
            found=f"roundup_power2_divisions:{parts} rounds the size of each tensor up",
            cost=f"for the {len(sizes)} matrices",
            fix="remove roundup_power2_divisions from PYTORCH_ALLOC_CONF",
        )


def _rounded(size: int, parts: int) -> int:
    """The size that the allocator takes. Source: torch 2.13, c10/core/CachingDeviceAllocator.h (roundup_power2)."""
    below = 1 << (size.bit_length() - 1)
    if size == below:
        return size
    step = max(1, below // parts)
    return below + -(-(size - below) // step) * step


def check_caching(subject: Subject) -> Iterator[Finding]:
    """Find torch's allocator without its cache."""
    value = subject.machine.settings.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "")
    if subject.machine.gpus and value:
        yield of_ms(
            "allocator-no-caching",
            _NO_CACHING_MS * subject.model.layers,
            found="PYTORCH_NO_CUDA_MEMORY_CACHING is set: each tensor is allocated and freed by the driver",
            cost=f"for each token of {subject.model.layers} layers, by a measurement on an H200",
            fix="unset PYTORCH_NO_CUDA_MEMORY_CACHING",
        )


def check_blocking(subject: Subject) -> Iterator[Finding]:
    """Find launches that wait for each kernel."""
    value = subject.machine.settings.get("CUDA_LAUNCH_BLOCKING", "")
    if subject.machine.gpus and value.lower() in _ON:
        yield of_ms(
            "launch-blocking",
            _BLOCKING_MS * subject.model.layers,
            found="CUDA_LAUNCH_BLOCKING is set: Python waits for each kernel",
            cost=f"for each token of {subject.model.layers} layers, by a measurement on an H200",
            fix="unset CUDA_LAUNCH_BLOCKING",
        )


def check_modules(subject: Subject) -> Iterator[Finding]:
    """Find kernels that are all loaded at the start."""
    value = subject.machine.settings.get("CUDA_MODULE_LOADING", "")
    if subject.machine.gpus and value.upper() == "EAGER":
        yield of_bytes(
            "module-loading",
            _EAGER_MODULES,
            of=subject.own,
            found="CUDA_MODULE_LOADING is EAGER: all kernels of all libraries are loaded",
            cost="of the GPU for each process, by a measurement on an H200",
            fix="unset CUDA_MODULE_LOADING, whose default is LAZY",
        )


def check_link(subject: Subject) -> Iterator[Finding]:
    """Find GPUs on a link of fewer lanes than they have, or of slow copies."""
    machine, weights = subject.machine, subject.model.weight_bytes
    for number, gpu in enumerate(machine.gpus):
        lane = _LANE_RATES.get(gpu.generation_max or 0)
        if lane is None or not gpu.width or not gpu.width_max:
            continue
        full, now = lane * gpu.width_max, lane * gpu.width
        if gpu.width < gpu.width_max:
            yield of_ms(
                "link-width",
                (weights / now - weights / full) * 1000,
                found=f"GPU {number} ({gpu.name}) is connected by {gpu.width} of {gpu.width_max} PCIe lanes",
                cost=f"for each copy of {format_bytes(weights)} of weights, as in a load",
                fix="move the card to a slot with all lanes, and check riser and BIOS (bifurcation)",
            )
        elif number == 0 and machine.pinned_rate and machine.pinned_rate < _SLOW_LINK * full:
            yield of_ms(
                "link-speed",
                (weights / machine.pinned_rate - weights / full) * 1000,
                found=f"copies to GPU {number} run at {machine.pinned_rate / 1e9:.1f} GB/s, and PCIe "
                f"{gpu.generation_max}.0 with {gpu.width_max} lanes has {full / 1e9:.1f}",
                cost=f"for each copy of {format_bytes(weights)} of weights",
                fix="check the PCIe generation in the BIOS, the riser, and the NUMA node of the process",
            )


def check_others(subject: Subject) -> Iterator[Finding]:
    """Find memory of a GPU that other processes hold."""
    for number, gpu in enumerate(subject.machine.gpus):
        held = gpu.total - gpu.free - gpu.used_here
        if held > _OTHERS * gpu.total:
            yield of_bytes(
                "gpu-shared",
                held,
                of=gpu.total,
                found=f"other processes hold memory of GPU {number} ({gpu.name})",
                cost=f"of {format_bytes(gpu.total)}",
                fix="qwen-vram monitor --once shows them; end those that are not needed",
            )


def allocator_setting(subject: Subject) -> str:
    """Return the setting of torch's allocator; the newer variable is preferred."""
    settings = subject.machine.settings
    return settings.get("PYTORCH_ALLOC_CONF") or settings.get("PYTORCH_CUDA_ALLOC_CONF") or ""


CHECKS = (
    check_fragments,
    check_rounding,
    check_caching,
    check_blocking,
    check_modules,
    check_link,
    check_others,
)
