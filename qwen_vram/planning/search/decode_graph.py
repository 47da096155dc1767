"""Reasons why decode steps are not captured, and the cost of single launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.timing.decode import decode_ms
from qwen_vram.spec.formats import FORMATS, FormatName
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.rules.table import CAPTURED

# The reason, in words, if a knob has another value than captured steps run with.
_REASONS: dict[str, Callable[[Profile], str]] = {
    "host_layers": lambda profile: f"{_layers(profile.host_layers)} on the CPU",
    "kv_device": lambda profile: f"keys and values are on the {profile.kv_device}",
    "attention": lambda profile: f"cache={profile.cache!r}, attention={profile.attention!r}",
}


def obstacle(profile: Profile, gpus: int = 1) -> str | None:
    """Return the reason why decode steps cannot be captured, in words; `None` if they can."""
    if gpus > 1:
        return f"layers are on {gpus} GPUs"
    other = [name for name, value in CAPTURED.items() if getattr(profile, name) != value]
    if profile.cache == "dynamic":
        other.append("attention")
    if other:
        return _REASONS[min(other, key=list(_REASONS).index)](profile)
    if profile.kv_format.is_quantized and profile.kernels != "fused":
        return f"keys and values are in {profile.kv_cache}, and kernels={profile.kernels!r}"
    formats = [one for one in (profile.weights, profile.head_format) if not _never_waits(one)]
    return f"products with {formats[0]} matrices are not captured" if formats else None


def _layers(number: int) -> str:
    return f"{number} {'layer computes' if number == 1 else 'layers compute'}"


def _never_waits(name: FormatName) -> bool:
    """Tell if a format's products never wait for the GPU, and run there by this library or bitsandbytes."""
    storage = FORMATS[name]
    return storage.is_16_bit or storage.is_weight_only or storage.is_bnb_4bit


def _waits(name: FormatName | None) -> bool:
    """Tell if a format's products wait for the GPU."""
    return name is not None and FORMATS[name].has_outliers


def not_captured(estimate: Estimate) -> str | None:
    """The reason why an estimate's decode steps on GPUs are launched one by one; `None` if they are captured."""
    assert estimate.architecture is not None
    if estimate.profile.captures:
        return None
    if estimate.architecture.adapter_activated:
        return "the adapter acts behind its invocation tokens only"
    return obstacle(estimate.profile, max(1, len(estimate.devices))) or "captured=False, or the graph does not fit"


def said_of(estimate: Estimate) -> str | None:
    """The reason, with predicted milliseconds of a token, and of one if the whole model could be captured."""
    reason, profile = not_captured(estimate), estimate.profile
    if reason is None:
        return None
    assert estimate.architecture is not None
    formats = {name: "int8-wo" for name in ("weights", "lm_head") if _waits(getattr(profile, name))}
    cache = "preallocated" if profile.cache == "dynamic" else profile.cache
    known = {**CAPTURED, **formats, "host_layers": 0, "disk_layers": 0, "cache": cache, "captured": True}
    if profile.kv_format.is_quantized:
        known["kernels"] = "fused"
    captured = replace(profile, **known)  # type: ignore[arg-type]
    now, then = (
        decode_ms(estimate.architecture, one, estimate.workload, estimate.machine) for one in (profile, captured)
    )
    quicker = f", not {then:.0f}" if round(then) < round(now) else ", as captured ones would take"
    return f"decode steps are launched one by one ({reason}): {now:.0f} ms a token{quicker}"
