"""Scale of an adapter's update: rank and alpha of each module, looked up one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from qwen_vram.checkpoints.adapters.settings import LoraSettings


def scale_of(settings: LoraSettings, module: str, rank: int) -> float:
    """Return the factor of `lora_B @ lora_A` of `module`, a path such as `"model.layers.0.self_attn.q_proj"`.

        alpha / rank, or alpha / sqrt(rank) with rsLoRA

    The rank is that of the tensors, because PEFT sorts the patterns when it saves them, so that the first that matches
    may not be the one that matched in training. Alpha is in the settings alone, and found as PEFT finds it.

    Source: rsLoRA, arXiv:2312.03732.
    """
    alpha = alpha_of(settings, module)
    return alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank


def alpha_of(settings: LoraSettings, module: str) -> float:
    """Alpha of `module`: of the first pattern that matches, or the common one."""
    return next(iter(_matches(settings.alpha_pattern, settings.key_of(module))), settings.lora_alpha)


def ranks_of(settings: LoraSettings, module: str) -> list[float]:
    """The ranks that the settings allow `module`: of every pattern that matches, or the common one."""
    return _matches(settings.rank_pattern, settings.key_of(module)) or [settings.r]


def alpha_is_ambiguous(settings: LoraSettings, module: str) -> bool:
    """Tell whether patterns with different alphas match, so that sorting them may have changed which one counts."""
    return len(set(_matches(settings.alpha_pattern, settings.key_of(module)))) > 1


def _matches(patterns: Mapping[str, float], path: str) -> list[float]:
    """The values of the patterns, in the file's order, that are the end of a module's path or of a parameter's."""
    # Source: peft 0.21.2, utils/other.py, get_pattern_key.
    return [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
