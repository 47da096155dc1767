"""The estimate of a model that is sharded over several GPUs."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.pipeline import slices
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.rules.table import check_split
from qwen_vram.spec.workload import Workload


def split_estimate(
    label: str,
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    layers: Mapping[int, int],
    *,
    machine: Machine,
    session: bool = False,
    held: Mapping[int, int] | None = None,
) -> Estimate:
    """Estimate a model with `layers` on each GPU (GPU number -> number of layers, in the order of the layers).

    Bytes that are copied from one GPU to the next are counted on the second. `machine` and `session` are as for
    `estimate`, and so is `held`, for each GPU.

    Raises:
        NotSupportedError: a knob that works on one GPU only.
        WorkloadError: a context that exceeds the model's positions.
    """
    check_split(profile, len(layers))
    parts = zip(layers, slices(architecture, tuple(layers.values())), strict=True)
    before = held or {}
    devices = {
        device: estimate(label, part, profile, workload, machine=machine, session=session, held=before.get(device, 0))
        for device, part in parts
    }
    names = ("weights", "kv_cache", "tensors", "workspace", "load_peak", "host", "disk")
    sums = {name: sum(getattr(one, name) for one in devices.values()) for name in names}
    return Estimate(
        model=label,
        architecture=architecture,
        profile=profile,
        workload=workload,
        **sums,
        moments=(),
        machine=machine,
        devices=devices,
    )


def split_of(known: Estimate) -> dict[int, int]:
    """The number of layers on each GPU, by the GPU's number; empty for one GPU."""
    return {device: part.architecture.num_hidden_layers for device, part in known.devices.items() if part.architecture}


def at_workload(known: Estimate, workload: Workload) -> Estimate:
    """Estimate the same model, profile and split for another workload.

    Raises:
        WorkloadError: a context that exceeds the model's positions.
    """
    assert known.architecture is not None
    what = (known.model, known.architecture, known.profile, workload)
    if known.devices:
        held = {device: part.held for device, part in known.devices.items()}
        return split_estimate(*what, split_of(known), machine=known.machine, held=held)
    return estimate(*what, machine=known.machine, held=known.held)
