"""Checks of libraries, kernels and devices before anything is allocated.

The planner refuses profiles that no machine can run; see `planning.support`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from qwen_vram.arithmetic.weights import SMALLEST_READ
from qwen_vram.dtypes import BF16, FP16
from qwen_vram.errors import BackendUnavailableError, NotSupportedError
from qwen_vram.planning.capacity.compiler import missing_compiler
from qwen_vram.planning.capacity.hardware import AMPERE
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.attention import fused as attention
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.backends.base import Backend, HostBackend, StreamingBackend
from qwen_vram.runtime.tensors.checkpoint import Checkpoint
from qwen_vram.runtime.torch_dtypes import TORCH_DTYPES, torch_dtype
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency
from qwen_vram.spec.rules.rule import Rule, broken

_LOGGER = logging.getLogger(__name__)

_INSTALL_FLASH = "pip install flash-attn --no-build-isolation"


class Here(NamedTuple):
    """A model in a profile, with the backend and the device that are to load it."""

    profile: Profile
    architecture: Architecture
    backend: Backend
    device: torch.device


def _captures(knob: str) -> Rule[Here]:
    return Rule(
        lambda here: getattr(here.profile, knob) and here.device.type != "cuda",
        knob,
        lambda here: f"{knob}=True runs on a GPU, as a CUDA graph, and this model goes to the CPU; use {knob}=False",
        "this machine",
    )


def _no_fused_attention(here: Here) -> str:
    """Return why the fused kernel does not run; empty if it does, or if the profile does not use it."""
    if here.profile.attention != "fused":
        return ""
    dtype = _dtype(here.profile, here.device)
    sizes = {layer.attention.head_dim for layer, _ in here.architecture.kinds}
    return next(filter(None, (attention.kernel_runs(dtype, size, here.device) for size in sizes)), "")


_HOST_LAYERS: Rule[Here] = Rule(
    lambda here: here.profile.host_layers > 0 and not isinstance(here.backend, HostBackend),
    "host_layers",
    lambda here: (
        f"host_layers={here.profile.host_layers}: the backend {here.backend.name!r} of weights="
        f"{here.profile.weights!r} does not say how its layers compute on the CPU; use host_layers=0"
    ),
    "this machine",
)
MACHINE_RULES: tuple[Rule[Here], ...] = (
    _captures("compiled"),
    _captures("captured"),
    Rule(
        lambda here: here.profile.cache == "paged" and not here.profile.captured and here.device.type == "cuda",
        "captured",
        lambda here: "concurrent requests (cache='paged') on a GPU need captured=True; set it, or leave it out",
        "this machine",
    ),
    Rule(
        lambda here: here.profile.cache == "paged" and here.device.type == "cuda" and bool(missing_compiler()),
        "cache",
        lambda here: (
            "concurrent requests (cache='paged') on a GPU need Triton and a C compiler, and here is no "
            f"{missing_compiler().removeprefix('a ')}; install it, or load without concurrency"
        ),
        "this machine",
        package="triton",
    ),
    Rule(
        lambda here: here.profile.streamed_layers > 0 and not isinstance(here.backend, StreamingBackend),
        "streamed_layers",
        lambda here: (
            f"streamed_layers={here.profile.streamed_layers}: the backend {here.backend.name!r} of weights="
            f"{here.profile.weights!r} does not say how its layers are moved; use streamed_layers=0"
        ),
        "this machine",
    ),
    _HOST_LAYERS,
    Rule(
        lambda here: bool(_no_fused_attention(here)),
        "attention",
        lambda here: f"attention='fused' cannot run: {_no_fused_attention(here)}; use attention='sdpa'",
        "this machine",
    ),
    Rule(
        lambda here: here.profile.attention == "flash_attention_2" and not _has_bf16(here.device),
        "attention",
        lambda here: (
            "attention='flash_attention_2' needs a GPU of the Ampere generation or newer; use attention='fused' or "
            "'sdpa'"
        ),
        "this machine",
        package="flash-attn",
    ),
    Rule(
        lambda here: here.profile.attention == "flash_attention_2" and find_spec("flash_attn") is None,
        "attention",
        lambda here: (
            "attention='flash_attention_2' needs flash-attn, which is not installed; run: "
            f"{_INSTALL_FLASH}, or use attention='fused', which runs torch's own flash kernel"
        ),
        "this machine",
        package="flash-attn",
        install=_INSTALL_FLASH,
    ),
)


def _refuse(rules: Iterable[Rule[Here]], here: Here) -> None:
    """Raise the error of the first rule that is broken."""
    rule = broken(rules, here)
    if rule is None:
        return
    if rule.package:
        raise BackendUnavailableError(rule.message(here), backend=rule.package, install=rule.install)
    raise NotSupportedError(rule.message(here), knob=rule.knob, value=getattr(here.profile, rule.knob))


def check(chosen: Plan, backend: Backend, device: torch.device) -> None:
    """Refuse by name a plan that cannot run here, before anything is allocated.

    Raises:
        NotSupportedError: a knob or a combination does not run on the device.
        BackendUnavailableError: a library or a GPU feature is missing.
    """
    profile, architecture = chosen.profile, chosen.estimate.architecture
    assert architecture is not None
    _refuse(MACHINE_RULES, Here(profile, architecture, backend, device))
    if profile.embeddings == "host" and not residency(architecture, profile).table_on_host:
        _LOGGER.warning(
            "embeddings='host' leaves the token table where it is: it is this model's head too (tie_word_embeddings); "
            "with quantized weights, lm_head in their format is a head of its own, and the table goes to the host"
        )
    backend.check(profile, device)
    if profile.host_layers:
        check_host(profile, architecture, backend)


def can_compute(architecture: Architecture, profile: Profile) -> bool:
    """Tell if the CPU here can compute streamed layers of a profile."""
    try:
        check_host(profile, architecture, get_backend(profile.weights))
    except (NotSupportedError, BackendUnavailableError):  # another package's backend, or no kernel for this CPU
        return False
    return True


def check_host(profile: Profile, architecture: Architecture, backend: Backend) -> None:
    """Refuse layers that cannot compute on this machine's CPU.

    Raises:
        NotSupportedError, BackendUnavailableError: they cannot compute on it.
    """
    if not isinstance(backend, HostBackend):
        message = _HOST_LAYERS.message(Here(profile, architecture, backend, torch.device("cpu")))
        raise NotSupportedError(message, knob="host_layers", value=profile.host_layers)
    backend.check_host(profile, architecture)


def check_files(checkpoint: Checkpoint, profile: Profile, dtype: torch.dtype) -> None:
    """Refuse disk layers if the model's dtype differs from the dtype in the checkpoint.

    Raises:
        NotSupportedError: the dtypes differ.
    """
    stored = checkpoint.files.tensors
    for weight in checkpoint.architecture.weights():
        tensor = stored.get(weight.name)
        quantized = checkpoint.architecture.stored_format is not None and weight.is_linear
        held = None if tensor is None or quantized else TORCH_DTYPES.get(tensor.dtype)  # `None`: as in its format
        if tensor and tensor.nbytes >= SMALLEST_READ and ".layers." in weight.name and held not in (None, dtype):
            raise NotSupportedError(
                f"disk_layers={profile.disk_layers}: {weight.name!r} is stored as {tensor.dtype} and runs in {dtype}; "
                "what stays on the disk is used as it is stored: choose weights in that dtype, or use disk_layers=0",
                knob="disk_layers",
                value=profile.disk_layers,
            )


def dtype_for(profile: Profile, device: torch.device) -> torch.dtype:
    """Return the model's dtype: fp16 instead of bf16 if the GPU has no bf16."""
    dtype = _dtype(profile, device)
    if dtype != torch_dtype(profile.dtype):
        _LOGGER.warning("this GPU has no bf16 (compute capability below 8.0): the model runs in fp16, of the same size")
    return dtype


def _dtype(profile: Profile, device: torch.device) -> torch.dtype:
    in_fp16 = profile.dtype == BF16.name and device.type == "cuda" and not _has_bf16(device)
    return torch_dtype(FP16.name if in_fp16 else profile.dtype)


def _has_bf16(device: torch.device) -> bool:
    """Tell if a device is a GPU of the Ampere generation or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
