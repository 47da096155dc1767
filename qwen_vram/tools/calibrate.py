"""`qwen-vram calibrate`: measure this machine once, for every later estimate.

Every step (`calibrate_steps`) runs in a fresh process: a CUDA context cannot be released, and kernels stay loaded.
This process itself never uses the GPU, so a step is alone on it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from typing import Any

from qwen_vram.checkpoints.machine_file import CalibrationError, make_folder, store
from qwen_vram.spec.machine import DEFAULT, FIGURES, Machine
from qwen_vram.tools.calibrate_steps import RESULT

# Each step's name, and the line that announces it.
STEPS = {
    "context": "the CUDA context",
    "kernels-bf16": "kernels that the bundled model loads in bf16",
    "kernels-nf4": "kernels that the bundled model loads in nf4",
    "rates": "copy rates of the GPU",
    "launches": "launches by Python and in a graph, and products of many rows",
    "copies": "copies within host memory",
    "products": "products on the CPU, of 16-bit and of 4-bit weights",
    "disk": "reads from the disk of the cache folder",
}
# Steps for a machine without a GPU.
HOST_STEPS = ("copies", "products", "disk")
# Figures that these steps measure.
_HOST_FIGURES = ("host_bandwidth", "host_product_rate", "host_4bit_rate", "host_matmul_rate", "disk_read_rate")
_STEP_SECONDS = 600


def calibrate(say: Callable[[str], object] = print) -> Machine:
    """Measure this machine's first visible GPU, CPU and disk, and store the result for every later estimate.

    It takes two minutes. Without a GPU, the CPU and the disk are measured, and the figures of a GPU stay the default.
    Nothing is stored unless every step succeeds.

    Args:
        say: Gets a line before each step, and one for each figure that stays the default.

    Raises:
        CalibrationError: a step fails, or the result cannot be stored.
    """
    make_folder()
    found: dict[str, Any] = {}
    steps = tuple(STEPS)
    say("looking for a GPU")
    missing = run_step("gpu")["no_gpu"]
    if missing:
        say(f"no NVIDIA GPU is measured ({missing}): its figures stay those of an {DEFAULT.device}")
        steps = HOST_STEPS
    for number, step in enumerate(steps, 1):
        say(f"{number}/{len(steps)} measuring {STEPS[step]}")
        found |= run_step(step)
    machine = machine_of(found)
    if "cuda_context" in machine.kept and not missing:
        say(
            "kept the default of cuda_context and lazy_kernels: the driver does not tell what this process takes "
            "(a container, or another program on the GPU)"
        )
    if "disk_read_rate" in machine.kept:
        say("kept the default of disk_read_rate: this system does not say how to read past its page cache")
    store(machine)
    return machine


def machine_of(found: dict[str, Any]) -> Machine:
    """Return the machine that the steps measured; a figure that could not be measured stays the default.

    Without the steps of a GPU, its figures all stay the default. Context and kernels are two parts of one sum, so a
    measured part is not combined with a default one. Both stay the default if the driver did not tell the size of a
    process.
    """
    if "context" not in found:
        return _host_of(found)
    context, kernels = found["context"], [found["kernels-bf16"], found["kernels-nf4"]]
    memory: dict[str, Any] = {"cuda_context": DEFAULT.cuda_context, "lazy_kernels": DEFAULT.lazy_kernels}
    hidden = context is None or None in kernels
    if not hidden:
        # The larger of the two formats, because a budget must hold either.
        memory = {"cuda_context": context, "lazy_kernels": max(0, max(kernels) - context)}
    kept = [*memory] if hidden else []
    disk = found["disk_read_rate"]
    if disk is None:
        kept.append("disk_read_rate")
    names = ("device", "torch", "driver", "host")
    rates = tuple(name for name in FIGURES if name not in ("cuda_context", "lazy_kernels", "disk_read_rate"))
    return Machine(
        **{name: found[name] for name in names + rates},
        **memory,
        disk_read_rate=DEFAULT.disk_read_rate if disk is None else disk,
        host_4bit_kernel=found["host_4bit_rate"] is not None,
        date=date.today().isoformat(),
        source="measured",
        kept=tuple(kept),
    )


def _host_of(found: dict[str, Any]) -> Machine:
    """Return a machine of which the CPU and the disk alone were measured."""
    measured = {name: found[name] for name in (*_HOST_FIGURES, "host", "torch") if found[name] is not None}
    kept = tuple(name for name in FIGURES if name not in _HOST_FIGURES or found[name] is None)
    has_kernel = found["host_4bit_rate"] is not None
    today = date.today().isoformat()
    return DEFAULT._replace(**measured, host_4bit_kernel=has_kernel, source="measured", date=today, kept=kept)


def run_step(step: str) -> dict[str, Any]:
    """Run one step in a separate process, and return the figures that it found.

    Raises:
        CalibrationError: the process fails or hangs.
    """
    command = [sys.executable, "-m", "qwen_vram.tools.calibrate_steps", step]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_STEP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _failed(step, f"no result after {_STEP_SECONDS} seconds") from error
    results = [line.removeprefix(RESULT) for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if ended.returncode or not results:
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise _failed(step, lines[-1])
    found: dict[str, Any] = json.loads(results[-1])
    return found


def _failed(step: str, why: str) -> CalibrationError:
    return CalibrationError(
        f"measuring {STEPS.get(step, 'a GPU')} failed: {why}; nothing was stored; all of it is shown by: "
        f"python -m qwen_vram.tools.calibrate_steps {step}",
        what=step,
    )
