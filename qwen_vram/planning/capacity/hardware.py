"""Limits of a plan by this machine: missing kernels, and an unmeasured CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.timing.decode import decode_ms
from qwen_vram.arithmetic.timing.host import has_no_4bit_kernel
from qwen_vram.checkpoints.cpu_info import cpu_name, has_4bit_kernel
from qwen_vram.dtypes import BF16
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile

# The first compute capability with bf16 and with torch's flash kernel.
# Source: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_flash_attention_hardware_support.
AMPERE = (8, 0)

# How much longer a token takes by the stated ratios of formats before a plan says so. They differ between CPUs: int4
# takes 1.65 times the time of bf16 on one, and 0.71 on another.
_SLOWER = 2.0

# Tells if this machine's CPU can compute streamed layers of a profile.
Computes = Callable[[Profile], bool]


def is_old(budget: Budget) -> bool:
    """Tell if a GPU of a budget is known to be older than Ampere."""
    return budget.vram is not None and budget.capability is not None and budget.capability < AMPERE


def knobs_on(budget: Budget, knobs: Mapping[str, object]) -> dict[str, object]:
    """The caller's knobs for a search, and the knobs that an old GPU requires."""
    return {"attention": "sdpa", **knobs} if is_old(budget) else dict(knobs)


def limits_of(budget: Budget, profile: Profile) -> str | None:
    """Return the changes of a plan for an old GPU, in words; `None` if nothing changes."""
    if not is_old(budget) or budget.capability is None:
        return None
    changed = ["attention='sdpa'"] if profile.name == "auto" and profile.attention == "sdpa" else []
    if profile.dtype == BF16.name:
        changed.append("fp16 in place of bf16, in the same size")
    if not changed:
        return None
    major, minor = budget.capability
    return f"compute capability {major}.{minor} is below 8.0 (Ampere): {', '.join(changed)}"


def with_this_cpu(machine: Machine, *, on_cpu: bool) -> Machine:
    """Return a machine for predicted times; if they are for an unmeasured CPU, it says if a kernel is missing there."""
    unknown = on_cpu and not machine.is_measured("host_product_rate")
    return machine._replace(host_4bit_kernel=has_4bit_kernel()) if unknown else machine


def slower_on_the_cpu(estimate: Estimate) -> str | None:
    """Say that quantized weights make steps on the CPU slower than 16-bit ones; `None` if they do not."""
    architecture, profile = estimate.architecture, estimate.profile
    if architecture is None or FORMATS[profile.weights].is_dense or architecture.stored_format is not None:
        return None
    plain = replace(profile, weights=profile.dtype, lm_head=None)
    now, then = (
        decode_ms(architecture, one, estimate.workload, estimate.machine, on_cpu=True) for one in (profile, plain)
    )
    if now < _SLOWER * then:
        return None
    no_kernel = FORMATS[profile.weights].is_bnb_4bit and has_no_4bit_kernel(estimate.machine)
    why = " (it has no AVX512-BF16, which the kernel needs)" if no_kernel else ""
    return (
        f"{profile.weights} weights save memory and are slower than 16-bit ones on this CPU{why}: {now:.0f} ms a "
        f"token, not {then:.0f}"
    )


def as_measured(profile: Profile) -> bool:
    """Assume that a CPU with measured rates has the kernels of the measurement."""
    return True


def is_measured_here(machine: Machine) -> bool:
    """Tell if a machine's CPU rates are those of this CPU; older files, without its name, count as this CPU."""
    return not machine.host or machine.host.rpartition(",")[0] == cpu_name()
