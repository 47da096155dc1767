"""Savers of a plan that vLLM does not have: refused, or named in a note."""

from __future__ import annotations

from qwen_vram.errors import NotSupportedError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile

# Knobs that a plan's budget may depend on, the values that turn them off, and what to do instead.
_REFUSED: tuple[tuple[str, object, str], ...] = (
    ("disk_layers", 0, "give a budget with which no layer is on the disk, or another format of weights"),
    ("host_layers", 0, "set host_layers=0"),
    (
        "streamed_layers",
        0,
        "set streamed_layers=0 and plan other weights; vLLM's own --cpu-offload-gb keeps weights on the host, and no "
        "plan counts it",
    ),
    (
        "kv_device",
        "device",
        "set kv_device='device'; vLLM needs the keys and values of running sequences on the device",
    ),
)


def check_mapped(architecture: Architecture, profile: Profile, model: str | None) -> None:
    """Refuse a plan with a saver that vLLM does not have, or without a checkpoint that vLLM could open.

    Raises:
        NotSupportedError: a knob or an adapter that has no counterpart in vLLM.
    """
    for knob, off, instead in _REFUSED:
        value = getattr(profile, knob)
        if value != off:
            raise NotSupportedError(f"{knob}={value!r} has no counterpart in vLLM; {instead}", knob=knob, value=value)
    if architecture.adapter_weights:
        raise NotSupportedError(
            "an adapter beside the base is not passed to vLLM; merge it first: qwen-vram merge BASE ADAPTER OUT",
            knob="adapter",
            value=sorted(architecture.adapted),
        )
    if model is None:
        raise NotSupportedError(
            "vLLM opens a checkpoint, and this plan is of a config; plan with a folder, a catalog name or a hub id",
            knob="model",
            value=None,
        )


def savers_lost(profile: Profile) -> tuple[str, ...]:
    """Return a note for each saver that changes nothing in vLLM, or that is different there."""
    lost = []
    if profile.embeddings == "host":
        lost.append("embeddings='host' is not in vLLM: the token embeddings are on the device, and are counted there")
    if profile.tiles:
        lost.append("dequantization='tiled' is not in vLLM, whose kernels read quantized weights directly")
    if profile.compiled:
        lost.append("compiled=True is vLLM's own compilation, which is on unless --enforce-eager is given")
    return tuple(lost)
