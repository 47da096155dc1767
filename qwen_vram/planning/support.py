"""Refusals of profiles that are counted but that no machine can load.

`runtime.loading.preflight` checks one machine for missing libraries, kernels and GPUs.
"""

from __future__ import annotations

from qwen_vram.errors import NotSupportedError
from qwen_vram.planning.adapter_refusals import no_adapter_beside
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.rules.rule import broken
from qwen_vram.spec.rules.table import ANYWHERE_RULES, Model


def not_loadable(architecture: Architecture, profile: Profile) -> NotSupportedError | None:
    """The reason why no machine runs `profile` with this model; `None` if one may, or for a plugged backend."""
    if FORMATS[profile.weights].is_plugged:
        return None
    model = Model(architecture, profile)
    rule = broken(ANYWHERE_RULES, model)
    if rule is None:
        return no_adapter_beside(architecture, profile)
    value = getattr(profile, rule.knob)
    beside = "" if rule.knob == "weights" else f" with weights={profile.weights!r}"
    return NotSupportedError(f"{rule.knob}={value!r}{beside}: {rule.message(model)}", knob=rule.knob, value=value)
