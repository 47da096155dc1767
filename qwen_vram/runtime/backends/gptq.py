"""Checkpoints of GPTQ and AWQ by GPTQModel, through `transformers`' own quantizers; they load as they are stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_vram.arithmetic.profile import Profile
from qwen_vram.errors import CheckpointError, UnknownNameError
from qwen_vram.runtime.backends.base import Request, from_pretrained
from qwen_vram.runtime.backends.gptq_library import check_installed, import_quietly, quietly

# What a module keeps of its checkpoint. It has no parameters: all of it are buffers.
_STORED = ("qweight", "qzeros", "scales", "g_idx", "bias")
# Plain kernels, which start at once and leave tensors as they are stored. GPTQModel's own choice on CUDA (Machete,
# Marlin, ExLlama) is compiled by nvcc for a minute or more when it is first used, and its choice on the CPU too.
_PLAIN = {"cpu": "torch", "cuda": "triton"}
# Layouts and bits that these read, triton without 3 bits. Source: GPTQModel 7.6.0, tritonv2.py, gemm_awq_triton.py.
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
KERNEL = "QWEN_VRAM_GPTQ_KERNEL"
KERNELS = ("auto", "machete", "marlin", "exllama_v2", "triton", "torch")


class GptqBackend:
    """GPTQModel's kernels. A 16-bit checkpoint is quantized beforehand, by `quantize_gptq()`."""

    name = "gptq"

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse a missing library, and a kernel that is none."""
        check_installed(f"weights={profile.weights!r}")
        _chosen_kernel()

    def load(self, request: Request) -> nn.Module:
        """The model with the checkpoint's tensors under its matrices, and a kernel for the device."""
        folder = request.files.folder
        settings = _settings(request.files.config, folder, request.profile.weights, request.device)
        import_quietly()
        config = request.config
        # The checkpoint's own settings win over any that are passed, so they are changed where they stand.
        config.quantization_config = settings
        if request.profile.weights == "awq" and request.device.type == "cuda":
            request = request._replace(dtype=torch.float16)  # its kernels know no bf16; transformers would say so
        with quietly():
            model = from_pretrained(request, config=config)
        for module in model.modules():
            # torch.compile of it: a compiler run for every shape, and none where there is no compiler.
            module.__dict__.pop("dequantize_weight", None)
        return model

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Codes, zeros, scales, the order of columns, and the bias."""
        if not isinstance(getattr(module, "qweight", None), torch.Tensor):
            return []
        found = (getattr(module, name, None) for name in _STORED)
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _settings(config: Mapping[str, object], folder: Path, method: str, device: torch.device) -> dict[str, Any]:
    """The checkpoint's `quantization_config` with the kernel in it."""
    settings: Any = config["quantization_config"]
    _check_settings(settings, method, folder)
    kernel = _chosen_kernel() or _PLAIN[device.type]
    if kernel == "triton" and (settings.get("bits") == 3 or find_spec("triton") is None):
        kernel = "torch"
    if method == "awq":
        kernel = {"torch": "torch_awq", "triton": "gemm_triton"}.get(kernel, kernel)
    return {**settings, "backend": kernel}


def _check_settings(settings: dict[str, Any], method: str, folder: Path) -> None:
    """Refuse what the kernels, or `transformers` on the way to them, cannot read."""
    keys = ("checkpoint_format", "format", "version")
    layout = next((settings[key] for key in keys if isinstance(settings.get(key), str)), _LAYOUTS[method][0]).lower()
    found = ""
    if settings.get("dynamic"):
        found = "bits or groups of their own for some modules ('dynamic')"
    elif layout not in _LAYOUTS[method]:
        found = f"its codes in the layout {layout!r}"
    elif settings.get("bits", 4) not in _BITS[method]:
        found = f"codes of {settings['bits']} bits"
    if found:
        raise CheckpointError(
            f"{str(folder)!r} has {found} by its quantization_config, which is not loaded; use a checkpoint of "
            f"{method.upper()} with one setting for all, {' or '.join(map(str, _BITS[method]))} bits, in the layout "
            f"{' or '.join(_LAYOUTS[method])}",
            path=str(folder),
        )


def _chosen_kernel() -> str | None:
    """What the environment variable asks for; `None` where it is not set."""
    kernel = os.environ.get(KERNEL)
    if kernel is not None and kernel not in KERNELS:
        raise UnknownNameError(f"kernel in {KERNEL}", kernel, KERNELS)
    return kernel
