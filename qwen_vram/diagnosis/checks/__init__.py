"""Checks: functions from a model on a machine to findings.

Modules:
    attention  Checks of attention: its implementation, its kernel, and copies that masks cause.
    cache      Checks of the KV cache and of the prefill.
    gpu        Checks of GPUs: settings of allocator and CUDA, the link, and other processes.
    host       Checks of the host: locked memory, swap, and the limits of a Windows subsystem.
    kernels    Checks of kernels that are missing, so that slower operations run without a message.
    libraries  Checks of library versions that are known to cost memory or time.
    placement  Checks of the location of weights: hooks, an unused GPU, and missing memory.
    weights    Checks of weights: their dtype, their quantization, and copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qwen_vram.diagnosis.checks import attention, cache, gpu, host, kernels, libraries, placement, weights
from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding

Check = Callable[[Subject], Iterator[Finding]]

# Checks of a model, which run only if there is one.
OF_MODELS: tuple[Check, ...] = (
    *weights.CHECKS,
    *attention.CHECKS,
    *cache.CHECKS,
    *placement.CHECKS,
    *libraries.CHECKS,
    kernels.check_linear_attention,
)
# Checks of a machine. Without a model, their figures are for a reference model.
OF_MACHINES: tuple[Check, ...] = (*gpu.CHECKS, *host.CHECKS, kernels.check_triton, libraries.check_cpu_build)
