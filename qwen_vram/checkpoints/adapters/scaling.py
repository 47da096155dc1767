"""Scale of an adapter's update, from rank and alpha of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from qwen_vram.checkpoints.adapters.settings import LoraSettings


def scale_of(settings: LoraSettings, module: str, rank: int) -> float:
    """Return the factor of `lora_B @ lora_A` for `module`, a path such as `"model.layers.0.self_attn.q_proj"`.

        alpha / rank, or alpha / sqrt(rank) with rsLoRA

    The rank is that of the tensors. PEFT sorts the patterns when it saves them, so the first match may not be the one
    of the training. Alpha is only in the settings, and is found as PEFT finds it.

    Source: rsLoRA, arXiv:2312.03732.
    """
    alpha = alpha_of(settings, module)
    return alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank


def alpha_of(settings: LoraSettings, module: str) -> float:
    """Return the alpha of `module`: that of the first pattern that matches, or the common one."""
    return next(iter(_matches(settings.alpha_pattern, settings.key_of(module))), settings.lora_alpha)


def ranks_of(settings: LoraSettings, module: str) -> list[float]:
    """Return the ranks that the settings allow for `module`: those of all patterns that match, or the common one."""
    return _matches(settings.rank_pattern, settings.key_of(module)) or [settings.r]


def alpha_is_ambiguous(settings: LoraSettings, module: str) -> bool:
    """Tell if patterns with different alphas match, so that sorting them may have changed the alpha."""
    return len(set(_matches(settings.alpha_pattern, settings.key_of(module)))) > 1


def _matches(patterns: Mapping[str, float], path: str) -> list[float]:
    """Return the values of the patterns that match the end of `path`, in the file's order."""
    # Source: peft 0.21.2, utils/other.py, get_pattern_key.
    return [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
