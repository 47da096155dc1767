"""Refusals of profiles that are counted but that no machine can load.

What one machine lacks (a library, a kernel, a GPU) is `runtime.loading.preflight`'s business.
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
    """Why no machine runs `profile` with this model; `None` where one may, and where a plugged backend has the say."""
    if FORMATS[profile.weights].is_plugged:
        return None
    model = Model(architecture, profile)
    rule = broken(ANYWHERE_RULES, model)
    if rule is None:
        return no_adapter_beside(architecture, profile)
    value = getattr(profile, rule.knob)
    beside = "" if rule.knob == "weights" else f" with weights={profile.weights!r}"
    return NotSupportedError(f"{rule.knob}={value!r}{beside}: {rule.message(model)}", knob=rule.knob, value=value)
