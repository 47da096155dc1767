"""Refusals of profiles that are counted but that no machine can load.

What one machine lacks (a library, a kernel, a GPU) is `runtime.loading.preflight`'s business.
"""

from __future__ import annotations

from qwen_vram.arithmetic.weights import MAXIMUM_OF, PACKED_ROWS, is_packed, may_be_on_disk
from qwen_vram.errors import NotSupportedError
from qwen_vram.planning.adapter_refusals import no_adapter_beside
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile


def not_loadable(architecture: Architecture, profile: Profile) -> NotSupportedError | None:
    """Why no machine runs `profile` with this model; `None` where one may, and where a plugged backend has the say."""
    if FORMATS[profile.weights].is_plugged:
        return None
    for knob, reason in (
        ("weights", _weights(architecture, profile)),
        ("lm_head", _head(architecture, profile)),
        ("streamed_layers", _streamed(profile)),
        ("disk_layers", _on_disk(architecture, profile)),
        ("host_layers", _computing(architecture, profile)),
    ):
        if reason:
            value = getattr(profile, knob)
            beside = "" if knob == "weights" else f" with weights={profile.weights!r}"
            return NotSupportedError(f"{knob}={value!r}{beside}: {reason}", knob=knob, value=value)
    return no_adapter_beside(architecture, profile)


def _weights(architecture: Architecture, profile: Profile) -> str:
    weights, storage = profile.weights, FORMATS[profile.weights]
    if storage.library != "gptqmodel" or architecture.stored_format is not None:
        return ""
    return (
        "GPTQ's codes cannot be made of a 16-bit checkpoint while it loads, for they depend on what the model computes "
        f"from sample texts. Quantize it once: qwen-vram quantize MODEL OUT --weights {weights} --calibration "
        f"texts.txt, or qv.quantize_gptq(MODEL, OUT, calibration=texts, bits={storage.bits}); then load OUT, or use "
        "weights='int4'"
    )


def _head(architecture: Architecture, profile: Profile) -> str:
    weights, head, storage = profile.weights, profile.head_format, FORMATS[profile.weights]
    if head == profile.dtype:
        return ""
    if storage.is_dense:
        kind = "" if FORMATS[head].is_dense else "quantized "
        return (
            f"a {kind}head of its own needs quantized weights of the same format; leave lm_head out, or set weights too"
        )
    if head != weights:
        return f"a model is quantized to one format; use lm_head={weights!r}, or leave one of the two out"
    if storage.library == "gptqmodel":
        return (
            f"a head that {weights} quantized too is not loaded by transformers; use a checkpoint whose head is in 16 "
            "bits, as most are"
        )
    return ""


def _streamed(profile: Profile) -> str:
    if not profile.streamed_layers or FORMATS[profile.weights].streams:
        return ""
    streaming = ", ".join(name for name, storage in FORMATS.items() if storage.streams)
    return f"layers in that format do not stream; use streamed_layers=0, or weights that do: {streaming}"


def _on_disk(architecture: Architecture, profile: Profile) -> str:
    if not profile.disk_layers or may_be_on_disk(architecture, profile):
        return ""
    if FORMATS[profile.weights].is_dense:
        return (
            f"a layer is stored as {', '.join(architecture.layer_dtypes)} and runs in {profile.dtype}; "
            "what stays on the disk is used as it is stored: choose weights in that dtype, or use disk_layers=0"
        )
    return (
        "such layers are made of this checkpoint's 16-bit ones while it loads, and are in no file; quantize it once "
        f"(qwen-vram quantize MODEL OUT --weights {profile.weights}) and load OUT, or use disk_layers=0"
    )


def _computing(architecture: Architecture, profile: Profile) -> str:
    storage = FORMATS[profile.weights]
    if not profile.host_layers:
        return ""
    if architecture.adapted:
        return (
            "an adapter's matrices are on the device; merge it first (qwen-vram merge), or use host_layers=0, and the "
            "layers stream"
        )
    if storage.is_dense:
        return ""
    if storage.bits != 4:
        return "bitsandbytes has no fused product in 8 bits for the CPU; use weights in 4 or 16 bits, or host_layers=0"
    for weight in architecture.block:
        if weight.is_linear and not is_packed(weight.shape):
            rows, columns = weight.shape
            return (
                f"the CPU's kernel takes matrices whose rows are a multiple of {PACKED_ROWS} and whose columns are one "
                f"of {MAXIMUM_OF}, got {rows:,} x {columns:,} ({weight.name}); use host_layers=0"
            )
    return ""
