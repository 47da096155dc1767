"""Times of a generation: to the first token, per later token, and in total."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.timing.decode import decode_ms
from qwen_vram.arithmetic.timing.host import HOST_NAME
from qwen_vram.arithmetic.timing.prefill import first_token_ms
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


class Times(NamedTuple):
    """Predicted times of a generation.

    Attributes:
        ms_per_token: Milliseconds of a decode step in the middle of the answer; with pages, of all requests.
        first_token_ms: Milliseconds from the prompt to the first token; with pages, of a request that comes alone.
        machine: The machine that they are for: its GPU, or its CPU if everything runs there.
        measured: That machine was measured (`qwen-vram calibrate`); otherwise the rates are stated defaults.
    """

    ms_per_token: float
    first_token_ms: float
    machine: str
    measured: bool

    def __str__(self) -> str:
        """The times in words, such as `5.1 ms a token, first token after 0.40 s, on NVIDIA H200 (stated rates)`."""
        first = f"{self.first_token_ms / 1000:.2f} s"
        return f"{self.ms_per_token:.1f} ms a token, first token after {first}, on {self.place}"

    @property
    def place(self) -> str:
        """The machine, and the origin of its rates, such as `NVIDIA H200 (stated rates)`."""
        return f"{self.machine} ({'measured' if self.measured else 'stated'} rates)"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return self._asdict()


def predict_times(
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    machine: Machine,
    *,
    on_cpu: bool = False,
) -> Times:
    """Predict the times of a generation; arguments are as for `decode_ms`."""
    first = replace(workload, batch_size=1) if profile.cache == "paged" else workload
    times = (
        decode_ms(architecture, profile, workload, machine, on_cpu=on_cpu),
        first_token_ms(architecture, profile, first, machine, on_cpu=on_cpu),
    )
    if not on_cpu:
        return Times(*times, machine.device, machine.is_measured("layer_launch_time"))
    measured = machine.is_measured("host_product_rate")
    name = machine.host or f"the CPU beside {machine.device}" if measured else HOST_NAME
    return Times(*times, name, measured)


def times_of(estimate: Estimate, *, on_cpu: bool) -> Times:
    """Predict the times for an estimate's model, profile and workload, on its machine."""
    assert estimate.architecture is not None
    what = (estimate.architecture, estimate.profile, estimate.workload)
    return predict_times(*what, estimate.machine, on_cpu=on_cpu)


def generation_ms(
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    machine: Machine,
    *,
    on_cpu: bool = False,
) -> float:
    """Predict the milliseconds of a whole generation, to compare profiles; arguments are as for `decode_ms`."""
    what = (architecture, profile, workload, machine)
    steps = workload.max_new_tokens - 1
    return first_token_ms(*what, on_cpu=on_cpu) + steps * decode_ms(*what, on_cpu=on_cpu)
