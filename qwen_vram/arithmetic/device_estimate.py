"""The estimate of one device, from weights, KV cache, activations and process memory."""

from __future__ import annotations

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.kv_cache import host_kv_bytes, kv_cache_bytes
from qwen_vram.arithmetic.process import load_peak_bytes, workspace_bytes
from qwen_vram.arithmetic.replay.live_bytes import moments
from qwen_vram.arithmetic.weights import weight_bytes
from qwen_vram.errors import WorkloadError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


def estimate(
    label: str,
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    *,
    machine: Machine,
    session: bool = False,
    held: int = 0,
) -> Estimate:
    """Return the estimate of an architecture, a profile and a workload.

    Args:
        machine: The machine whose CUDA context and kernels the process counts.
        session: Count a session of workloads up to this one, as a plan does (`Estimate.covered`).
        held: As for `Estimate`.

    Raises:
        WorkloadError: a context that exceeds the model's positions, or more streamed layers than the model has.
    """
    workload.check(architecture)
    if profile.streamed_layers > architecture.num_hidden_layers:
        raise WorkloadError(
            f"streamed_layers {profile.streamed_layers} is more than the model's num_hidden_layers "
            f"{architecture.num_hidden_layers}; stream at most that many",
            name="streamed_layers",
            got=profile.streamed_layers,
        )
    stored = weight_bytes(architecture, profile)
    workspace = workspace_bytes(architecture, profile, workload)
    every = moments(architecture, profile, workload)
    peak = max(moment.total for moment in every)
    context, batch = workload.context_len, workload.batch_size
    cache = 0
    if workload.logits == "last":
        cache = kv_cache_bytes(architecture, profile, tokens=context, batch_size=batch, context_len=context)
    # The last decode step holds one token less than the context, and the full cache must be counted.
    peak = max(peak, cache)
    smaller: list[Workload] = []
    if session:
        from qwen_vram.arithmetic.session import critical_workloads  # for plans only

        smaller = critical_workloads(profile, workload)
    return Estimate(
        model=label,
        architecture=architecture,
        profile=profile,
        workload=workload,
        weights=stored.device,
        kv_cache=cache,
        tensors=peak - cache,
        workspace=workspace,
        load_peak=load_peak_bytes(architecture, profile),
        host=stored.host + host_kv_bytes(architecture, profile, batch_size=batch, context_len=context),
        disk=stored.disk,
        moments=every,
        machine=machine,
        held=held,
        covered=tuple(estimate(label, architecture, profile, one, machine=machine) for one in smaller),
    )
