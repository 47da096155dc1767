"""What can be run here: libraries, kernels and devices, checked before anything is read or allocated.

What can be run nowhere is refused when it is planned; see `planning.loadable`.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.weights import SMALLEST_READ, table_on_host
from qwen_vram.errors import BackendUnavailableError, NotSupportedError
from qwen_vram.planning.hardware import AMPERE
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime import attention
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.backends.base import Backend, HostBackend, StreamingBackend
from qwen_vram.runtime.checkpoint import Checkpoint

_LOGGER = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def check(chosen: Plan, backend: Backend, device: torch.device) -> None:
    """Refuse by name what cannot be run here, before anything is allocated.

    Raises:
        NotSupportedError: a knob that does not run on the device, or a combination.
        BackendUnavailableError: a missing library or GPU feature.
    """
    profile = chosen.profile
    if profile.captures and device.type != "cuda":
        knob = "compiled" if profile.compiled else "captured"
        raise NotSupportedError(
            f"{knob}=True runs on a GPU, as a CUDA graph, and this model goes to the CPU; use {knob}=False",
            knob=knob,
            value=True,
        )
    architecture = chosen.estimate.architecture
    assert architecture is not None
    if profile.streamed_layers:
        _check_streaming(profile, backend)
    if profile.embeddings == "host" and not table_on_host(architecture, profile):
        _LOGGER.warning(
            "embeddings='host' leaves the token table where it is: it is this model's head too (tie_word_embeddings); "
            "with quantized weights, lm_head in their format is a head of its own, and the table goes to the host"
        )
    backend.check(profile, device)
    if profile.host_layers:
        check_host(profile, architecture, backend)
    if profile.attention == "fused":
        reason = attention.kernel_runs(dtype_for(profile, device), architecture.head_dim, device)
        if reason:
            raise NotSupportedError(
                f"attention='fused' cannot run: {reason}; use attention='sdpa'", knob="attention", value="fused"
            )
    if profile.attention == "flash_attention_2":
        _check_flash_attention_2(device)


def _check_streaming(profile: Profile, backend: Backend) -> None:
    if not isinstance(backend, StreamingBackend):
        raise NotSupportedError(
            f"streamed_layers={profile.streamed_layers}: the backend {backend.name!r} of weights={profile.weights!r} "
            "does not say how its layers are moved; use streamed_layers=0",
            knob="streamed_layers",
            value=profile.streamed_layers,
        )


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
        NotSupportedError, BackendUnavailableError: they cannot.
    """
    if not isinstance(backend, HostBackend):
        raise NotSupportedError(
            f"host_layers={profile.host_layers}: the backend {backend.name!r} of weights={profile.weights!r} does not "
            "say how its layers compute on the CPU; use host_layers=0",
            knob="host_layers",
            value=profile.host_layers,
        )
    backend.check_host(profile, architecture)


def check_files(checkpoint: Checkpoint, profile: Profile, dtype: torch.dtype) -> None:
    """Refuse disk layers that the model runs in another dtype than the checkpoint holds them in.

    Raises:
        NotSupportedError: there are.
    """
    stored = checkpoint.files.tensors
    for weight in checkpoint.architecture.weights():
        tensor = stored.get(weight.name)
        quantized = checkpoint.architecture.stored_format is not None and weight.is_linear
        held = None if tensor is None or quantized else _STORED_DTYPES.get(tensor.dtype)  # `None`: as its format has it
        if tensor and tensor.nbytes >= SMALLEST_READ and ".layers." in weight.name and held not in (None, dtype):
            raise NotSupportedError(
                f"disk_layers={profile.disk_layers}: {weight.name!r} is stored as {tensor.dtype} and runs in {dtype}; "
                "what stays on the disk is used as it is stored: choose weights in that dtype, or use disk_layers=0",
                knob="disk_layers",
                value=profile.disk_layers,
            )


def _check_flash_attention_2(device: torch.device) -> None:
    install = "pip install flash-attn --no-build-isolation"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE:
        raise BackendUnavailableError(
            "attention='flash_attention_2' needs a GPU of the Ampere generation or newer; use attention='fused' or "
            "'sdpa'",
            backend="flash-attn",
        )
    if find_spec("flash_attn") is None:
        raise BackendUnavailableError(
            f"attention='flash_attention_2' needs flash-attn, which is not installed; run: {install}, or use "
            "attention='fused', which runs torch's own flash kernel",
            backend="flash-attn",
            install=install,
        )


def dtype_for(profile: Profile, device: torch.device) -> torch.dtype:
    """The model's dtype: fp16 in bf16's place where the GPU has no bf16."""
    if profile.dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        _LOGGER.warning("this GPU has no bf16 (compute capability below 8.0): the model runs in fp16, of the same size")
        return torch.float16
    return _DTYPES[profile.dtype]
