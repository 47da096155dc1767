"""Run Qwen models in as little GPU memory as possible, and know the peak before you load.

Importing this loads nothing outside the standard library; torch comes in with the first `load()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.catalog import CATALOG
from qwen_vram.arithmetic.estimate import Estimate, estimate_vram
from qwen_vram.arithmetic.profile import PROFILES, Profile
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.workload import FULL_CARD_WORKLOAD, Workload
from qwen_vram.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    HubError,
    NotSupportedError,
    QwenVramError,
    UnitError,
    UnknownNameError,
    WorkloadError,
)
from qwen_vram.planning.budget import Budget
from qwen_vram.planning.placement import offload_map
from qwen_vram.planning.planner import Plan, plan

if TYPE_CHECKING:
    from qwen_vram.runtime.loaded import LoadedModel
    from qwen_vram.runtime.loader import load

__version__ = "0.1.0"

# What needs torch, by the module that has it; imported on first use.
_RUNTIME = {"LoadedModel": "qwen_vram.runtime.loaded", "load": "qwen_vram.runtime.loader"}

__all__ = [
    "CATALOG",
    "FORMATS",
    "FULL_CARD_WORKLOAD",
    "PROFILES",
    "Architecture",
    "BackendUnavailableError",
    "Budget",
    "CheckpointError",
    "ConfigError",
    "DoesNotFitError",
    "Estimate",
    "HubError",
    "LoadedModel",
    "NotSupportedError",
    "Plan",
    "Profile",
    "QwenVramError",
    "UnitError",
    "UnknownNameError",
    "Workload",
    "WorkloadError",
    "estimate_vram",
    "load",
    "offload_map",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in _RUNTIME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_RUNTIME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
