"""Checkpoints of GPTQ and AWQ by GPTQModel, loaded as they are stored."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from qwen_vram.errors import UnknownNameError
from qwen_vram.runtime.backends.base import Request, from_pretrained, stored_config
from qwen_vram.runtime.backends.gptq_library import check_installed, import_quietly, quietly
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.quantization import AWQ, GPTQ, quantization_of, settings_of

# Tensors that a module keeps of its checkpoint. They are buffers: the module has no parameters.
_STORED = ("qweight", "qzeros", "scales", "g_idx", "bias")
# Plain kernels, which need no compilation and leave tensors as they are stored. nvcc compiles GPTQModel's own choice on
# CUDA (Machete, Marlin, ExLlama) for a minute or more at the first use. Its choice on the CPU is compiled too.
_PLAIN = {"cpu": "torch", "cuda": "triton"}
# GPTQModel's names of the plain kernels for AWQ.
_NAMED = {AWQ: {"torch": "torch_awq", "triton": "gemm_triton"}}
# Settings of a checkpoint that determine how its tensors are read.
_DEFAULT_BITS = 4
_READ = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "version", "zero_point", "meta")
KERNEL = "QWEN_VRAM_GPTQ_KERNEL"
KERNELS = ("auto", "machete", "marlin", "exllama_v2", "triton", "torch")


class GptqBackend:
    """The backend of GPTQModel's kernels. `quantize_gptq()` quantizes a 16-bit checkpoint beforehand."""

    name = "gptq"

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse a missing library, and an unknown kernel."""
        check_installed(f"weights={profile.weights!r}")
        _chosen_kernel()

    def load(self, request: Request) -> nn.Module:
        """Return the model with the checkpoint's tensors in its matrices, and a kernel for the device."""
        settings = _settings(request)
        import_quietly()
        config = stored_config(request)
        # The checkpoint's own settings override arguments, so they are changed in the config.
        config.quantization_config = settings
        if FORMATS[request.profile.weights].is_awq and request.device.type == "cuda":
            request = request._replace(dtype=torch.float16)  # its kernels do not support bf16; transformers would warn
        with quietly():
            model = from_pretrained(request._replace(made=_missing_order(request)), config=config)
        for module in model.modules():
            # torch.compile of it would run a compiler for every shape, and fail without a compiler.
            module.__dict__.pop("dequantize_weight", None)
        return model

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Return codes, zeros, scales, the order of columns, and the bias."""
        if not isinstance(getattr(module, "qweight", None), torch.Tensor):
            return []
        found = (getattr(module, name, None) for name in _STORED)
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _settings(request: Request) -> dict[str, Any]:
    """Return the checkpoint's `quantization_config` with the kernel, and only the settings that loading needs.

    Quantized modules are listed by their full names, so the file's own rules for names are not needed.
    """
    method, block = request.profile.weights, settings_of(quantization_of(request.files.config))
    kernel = _chosen_kernel() or _PLAIN[request.device.type]
    if kernel == "triton" and (block.get("bits") == 3 or find_spec("triton") is None):
        kernel = "torch"
    kernel = _NAMED.get(method, {}).get(kernel, kernel)
    settings = {"bits": _DEFAULT_BITS, **{key: block[key] for key in _READ if key in block}}
    tensors = request.files.tensors
    quantized = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    if method == GPTQ:
        settings["modules_in_block_to_quantize"] = [quantized]
    else:
        plain = [name.removesuffix(".weight") for name in tensors if name.endswith("proj.weight")]
        settings["modules_to_not_convert"] = sorted(plain) or None
    return {**settings, "quant_method": method, "backend": kernel}


def _missing_order(request: Request) -> dict[str, torch.Tensor]:
    """Return the group of each column for every matrix without `g_idx`, by the name of that tensor.

    The groups are in order, the only meaning without `desc_act`. A checkpoint with `desc_act` is refused.
    """
    if FORMATS[request.profile.weights].is_awq:
        return {}
    tensors = request.files.tensors
    settings: Any = settings_of(quantization_of(request.files.config))
    bits, size = settings.get("bits", _DEFAULT_BITS), settings.get("group_size", 128)
    made = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        order = f"{name.removesuffix('.qweight')}.g_idx"
        if order not in tensors:
            columns = tensors[name].shape[0] * 32 // bits
            made[order] = torch.arange(columns, dtype=torch.int32) // (size if size > 0 else columns)
    return made


def _chosen_kernel() -> str | None:
    """Return the kernel that the environment variable names; `None` if it is not set."""
    kernel = os.environ.get(KERNEL)
    if kernel is not None and kernel not in KERNELS:
        raise UnknownNameError(f"kernel in {KERNEL}", kernel, KERNELS)
    return kernel
