"""Checks of the location of weights: hooks, an unused GPU, and missing memory."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.checkpoints.machine_file import current
from qwen_vram.diagnosis.checks.cache import UNPINNED_RATE
from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes, of_ms
from qwen_vram.units import format_bytes

_STREAM = "qv.load(model, vram=...), which pins these layers and copies them ahead of their use"


def check_host(subject: Subject) -> Iterator[Finding]:
    """Find weights in host memory that hooks copy in each forward pass."""
    offload = subject.model.offload
    if not offload.host:
        return
    rate = subject.machine.unpinned_rate or UNPINNED_RATE
    ms, origin = _hook_ms(subject, offload.host) or (offload.host / rate * 1000, f"at {rate / 1e9:.1f} GB/s")
    yield of_ms(
        "offload-host",
        ms,
        found=f"accelerate's hooks move {format_bytes(offload.host)} of weights for each forward pass",
        cost=f"for each token, {origin}",
        fix=f"{_STREAM}; or load without device_map if the model fits",
    )


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Find weights in files that hooks read in each forward pass."""
    offload = subject.model.offload
    if not offload.disk:
        return
    rate = current().disk_read_rate
    ms, origin = _hook_ms(subject, offload.disk) or (offload.disk / rate * 1000, f"at {rate / 1e9:.1f} GB/s")
    yield of_ms(
        "offload-disk",
        ms,
        found=f"accelerate's hooks read {format_bytes(offload.disk)} of weights from files for each forward pass",
        cost=f"for each token, {origin}",
        fix="qv.load(model, weights='nf4', vram=...), which keeps 4-bit layers in memory; or add host memory",
    )


def _hook_ms(subject: Subject, nbytes: int) -> tuple[float, str] | None:
    """Milliseconds of the hooks for a number of bytes, if some hooks were measured."""
    offload = subject.model.offload
    if offload.hook_ms is None or not offload.measured:
        return None
    scaled = offload.hook_ms * nbytes / offload.measured
    return scaled, f"measured on the hooks of {format_bytes(offload.measured)}"


def check_unpinned(subject: Subject) -> Iterator[Finding]:
    """Find offloaded weights in memory that is not pinned, on a machine whose copies were measured."""
    offload, machine = subject.model.offload, subject.machine
    unpinned = offload.host - offload.pinned
    if unpinned <= 0 or not machine.pinned_rate or not machine.unpinned_rate:
        return
    ms = (unpinned / machine.unpinned_rate - unpinned / machine.pinned_rate) * 1000
    if ms > 0:
        yield of_ms(
            "offload-unpinned",
            ms,
            found=f"{format_bytes(unpinned)} of offloaded weights are not pinned: "
            f"{machine.unpinned_rate / 1e9:.1f} and not {machine.pinned_rate / 1e9:.1f} GB/s",
            cost="for each token, by the measured rates of this link",
            fix=_STREAM,
        )


def check_unused_gpu(subject: Subject) -> Iterator[Finding]:
    """Find a model that computes on the CPU beside a GPU."""
    model, gpus = subject.model, subject.machine.gpus
    if model.device != "cpu" or not gpus or not subject.machine.host_rate:
        return
    name, device_rate = gpus[0].name, current().device_bandwidth
    read = model.weight_bytes
    ms = (read / subject.machine.host_rate - read / device_rate) * 1000
    if ms <= 0:
        return
    fits = subject.own <= gpus[0].free
    yield of_ms(
        "gpu-unused",
        ms,
        found=f"the model computes on the CPU, and {name} has {format_bytes(gpus[0].free)} free",
        cost=f"for each token to read the weights at {subject.machine.host_rate / 1e9:.1f} GB/s (measured)",
        fix='from_pretrained(..., device_map="cuda")' if fits else _STREAM,
    )


def check_fits(subject: Subject) -> Iterator[Finding]:
    """Find a workload that needs more memory than the device has free."""
    missing = subject.own - subject.free
    if subject.model.on_gpu and subject.machine.gpus:
        missing += subject.estimate().beside_torch
    elif subject.model.is_live and not subject.model.on_gpu:
        missing = subject.beside_weights() - subject.machine.ram_available
    if missing <= 0:
        return
    lengths = f"{subject.workload.prompt_len:,} + {subject.workload.max_new_tokens:,} tokens"
    place = "gpu-memory" if subject.model.on_gpu else "host-memory"
    yield of_bytes(
        place,
        missing,
        of=1,
        found=f"the model with {lengths} needs {format_bytes(subject.free + missing)}, and "
        f"{format_bytes(subject.free)} are free",
        cost="are missing",
        fix=f"qwen-vram plan MODEL --vram {subject.free // 2**20}MiB"
        if subject.model.on_gpu
        else 'qv.load(model, weights="nf4"), or a shorter prompt',
    )


CHECKS = (check_host, check_disk, check_unpinned, check_unused_gpu, check_fits)
