"""Run Qwen models in as little GPU memory as possible, and know the peak before you load.

Importing the package loads nothing outside the standard library. The first `load()` imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_vram.arithmetic.estimate import Estimate
    from qwen_vram.benchmark.bench import Benchmark, bench
    from qwen_vram.benchmark.results import read_benchmark
    from qwen_vram.benchmark.row import BenchmarkRow
    from qwen_vram.checkpoints.adapters.errors import AdapterError
    from qwen_vram.diagnosis.doctor import doctor
    from qwen_vram.diagnosis.finding import Finding
    from qwen_vram.diagnosis.report import Diagnosis
    from qwen_vram.errors import (
        BackendUnavailableError,
        CheckpointError,
        ConfigError,
        GenerationStoppedError,
        HubError,
        NotFiniteError,
        NotSupportedError,
        PlanNotHeldError,
        QuantizationFailedError,
        QueueFullError,
        QwenVramError,
        UnitError,
        UnknownNameError,
        WorkloadError,
    )
    from qwen_vram.estimator import estimate_vram
    from qwen_vram.fleet.data import FleetOption
    from qwen_vram.fleet.errors import WishNotMetError
    from qwen_vram.fleet.plan import plan_fleet
    from qwen_vram.fleet.result import FleetPlan
    from qwen_vram.lora.merge import merge_lora_then_quantize
    from qwen_vram.lora.report import MergeReport
    from qwen_vram.monitor.log import read_log
    from qwen_vram.monitor.monitor import Monitor
    from qwen_vram.monitor.plot import plot_log
    from qwen_vram.planning.capacity.budget import Budget
    from qwen_vram.planning.errors import DoesNotFitError
    from qwen_vram.planning.planner import Plan
    from qwen_vram.planning.questions import max_batch, max_concurrency, max_context, min_vram, offload_map, plan
    from qwen_vram.quality.check import check
    from qwen_vram.quality.report import QualityReport
    from qwen_vram.runtime.conversations import Conversation
    from qwen_vram.runtime.gptq.quantize import quantize_gptq
    from qwen_vram.runtime.loaded_model import LoadedModel
    from qwen_vram.runtime.loading.load import load
    from qwen_vram.spec.architecture import Architecture
    from qwen_vram.spec.catalog import CATALOG
    from qwen_vram.spec.formats import FORMATS
    from qwen_vram.spec.profile import PROFILES, Profile
    from qwen_vram.spec.workload import FULL_CARD_WORKLOAD, Workload

__version__ = "0.1.0"

# Every public name by the module that defines it, imported on first use. A test compares it with the imports above.
_MODULES = {
    "spec.architecture": ("Architecture",),
    "spec.catalog": ("CATALOG",),
    "arithmetic.estimate": ("Estimate",),
    "estimator": ("estimate_vram",),
    "spec.profile": ("PROFILES", "Profile"),
    "spec.formats": ("FORMATS",),
    "spec.workload": ("FULL_CARD_WORKLOAD", "Workload"),
    "errors": (
        "BackendUnavailableError",
        "CheckpointError",
        "ConfigError",
        "GenerationStoppedError",
        "HubError",
        "NotFiniteError",
        "NotSupportedError",
        "PlanNotHeldError",
        "QuantizationFailedError",
        "QueueFullError",
        "QwenVramError",
        "UnitError",
        "UnknownNameError",
        "WorkloadError",
    ),
    "checkpoints.adapters.errors": ("AdapterError",),
    "diagnosis.doctor": ("doctor",),
    "diagnosis.finding": ("Finding",),
    "diagnosis.report": ("Diagnosis",),
    "fleet.data": ("FleetOption",),
    "fleet.errors": ("WishNotMetError",),
    "fleet.plan": ("plan_fleet",),
    "fleet.result": ("FleetPlan",),
    "lora.merge": ("merge_lora_then_quantize",),
    "lora.report": ("MergeReport",),
    "monitor.log": ("read_log",),
    "monitor.monitor": ("Monitor",),
    "monitor.plot": ("plot_log",),
    "planning.errors": ("DoesNotFitError",),
    "planning.capacity.budget": ("Budget",),
    "planning.planner": ("Plan",),
    "planning.questions": ("max_batch", "max_concurrency", "max_context", "min_vram", "offload_map", "plan"),
    "runtime.conversations": ("Conversation",),
    "runtime.loaded_model": ("LoadedModel",),
    "runtime.loading.load": ("load",),
    "runtime.gptq.quantize": ("quantize_gptq",),
    "benchmark.bench": ("Benchmark", "bench"),
    "benchmark.results": ("read_benchmark",),
    "benchmark.row": ("BenchmarkRow",),
    "quality.check": ("check",),
    "quality.report": ("QualityReport",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CATALOG",
    "FORMATS",
    "FULL_CARD_WORKLOAD",
    "PROFILES",
    "AdapterError",
    "Architecture",
    "BackendUnavailableError",
    "Benchmark",
    "BenchmarkRow",
    "Budget",
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "Diagnosis",
    "DoesNotFitError",
    "Estimate",
    "Finding",
    "FleetOption",
    "FleetPlan",
    "GenerationStoppedError",
    "HubError",
    "LoadedModel",
    "MergeReport",
    "Monitor",
    "NotFiniteError",
    "NotSupportedError",
    "Plan",
    "PlanNotHeldError",
    "Profile",
    "QualityReport",
    "QuantizationFailedError",
    "QueueFullError",
    "QwenVramError",
    "UnitError",
    "UnknownNameError",
    "WishNotMetError",
    "Workload",
    "WorkloadError",
    "bench",
    "check",
    "doctor",
    "estimate_vram",
    "load",
    "max_batch",
    "max_concurrency",
    "max_context",
    "merge_lora_then_quantize",
    "min_vram",
    "offload_map",
    "plan",
    "plan_fleet",
    "plot_log",
    "quantize_gptq",
    "read_benchmark",
    "read_log",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"qwen_vram.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
