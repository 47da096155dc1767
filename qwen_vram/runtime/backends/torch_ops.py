"""int4, int8-wo and fp8 by torch's own operators, quantized while they load."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_vram.errors import BackendUnavailableError
from qwen_vram.runtime.backends.base import Request, from_pretrained, stored_config
from qwen_vram.runtime.linear.int4_packing import order_is_known
from qwen_vram.runtime.linear.weight_only import WeightOnlyLinear
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile

# tinygemm uses bf16 tensor cores. Source: torch 2.11, int4mm.cu.
_OLDEST_INT4 = (8, 0)


class TorchBackend:
    """The backend of weight-only formats on torch's own operators, without other libraries."""

    name = "torch"

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse int4 if its kernels do not run."""
        reason = _int4_cannot_run(device) if FORMATS[profile.weights].is_tinygemm else ""
        if reason:
            raise BackendUnavailableError(f"weights='int4' cannot run: {reason}; use weights='nf4'", backend=self.name)

    def load(self, request: Request) -> nn.Module:
        """Return the model with its matrices quantized; embeddings, norms and biases keep the model's dtype."""
        config = _config(request.profile)  # also registers the quantizer, which a stored checkpoint needs
        return from_pretrained(
            request, **({"config": stored_config(request)} if request.stored else {"quantization_config": config})
        )

    def saved_config(self, model: nn.Module, profile: Profile) -> dict[str, Any]:
        """Return the `quantization_config`, which lists every matrix in 16 bits."""
        config = _config(profile)
        plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        config.modules_to_not_convert = sorted({*plain, *config.modules_to_not_convert})
        saved: dict[str, Any] = config.to_dict()
        return saved

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Return the scales, and the zeros if the format has them."""
        return [getattr(module, module.scales)] if isinstance(module, WeightOnlyLinear) else []


def _config(profile: Profile) -> Any:
    from qwen_vram.runtime.quantize_on_load import WeightOnlyConfig

    return WeightOnlyConfig(profile.weights, [] if profile.head_format == profile.weights else ["lm_head"])


def _int4_cannot_run(device: torch.device) -> str:
    """Return why torch's int4 kernels do not run on `device`; empty if they do."""
    kernel = "_weight_int4pack_mm_for_cpu" if device.type == "cpu" else "_weight_int4pack_mm"
    if not hasattr(torch.ops.aten, kernel):
        return f"torch {torch.__version__} lacks {kernel}"
    if device.type == "cpu":
        return "" if order_is_known() else "torch keeps its codes in an order that is not known here, on this CPU"
    if torch.version.hip:
        return "its codes are laid out for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_INT4:
        return f"it needs a GPU of compute capability 8.0, got {capability[0]}.{capability[1]}"
    return ""
