"""Recovery of 4-bit weights that bitsandbytes has repacked on the CPU.

bitsandbytes repacks a matrix in place at its first forward pass on a CPU with AVX512-BF16. It reorders the codes and
rounds the scales to bf16. `state_dict()` restores the codes, but quantizes the rounded scales, so the saved matrix
differs from the loaded one. Source: bitsandbytes 0.50.2, nn/modules.py (Linear4bit) and functional.py. This module
keeps the scales from before: one byte for 64 weights with double quantization, four bytes without.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from qwen_vram.errors import NotSupportedError


def keep_scales(model: nn.Module) -> None:
    """Make `state_dict()` of every 4-bit matrix return its present values, also after forward passes."""
    for module in model.modules():
        if _state(module) is not None:
            _keep(module)
            module.register_state_dict_pre_hook(_unpack)  # type: ignore[no-untyped-call]


def check_scales(model: nn.Module) -> None:
    """Refuse a model with a repacked matrix whose scales were not kept.

    Raises:
        NotSupportedError: there is such a matrix, which was quantized after `load()`.
    """
    for name, module in model.named_modules():
        state = _state(module)
        if _was_packed(state) and not hasattr(state, "before_packing"):
            raise NotSupportedError(
                f"{name!r} was quantized anew after it was loaded, and has run on the CPU since, which rounds its "
                "scales; save before the model runs",
                knob="weights",
                value=state.quant_type,
            )


def _state(module: nn.Module) -> Any:
    return getattr(getattr(module, "weight", None), "quant_state", None)


def _was_packed(state: Any) -> bool:
    return hasattr(state, "original_qshape")


def _keep(module: nn.Module) -> None:
    """Keep a shallow copy of a matrix's state in the state itself: packing replaces tensors, and changes none."""
    state = _state(module)
    state.before_packing = copy.copy(state)


def _unpack(module: Any, prefix: str, keep_vars: bool) -> None:
    """Restore codes and scales before `state_dict()` reads them; the next forward pass packs them again."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = _state(module)
    if not _was_packed(state) or not hasattr(state, "before_packing"):
        return
    kept = state.before_packing
    if state.packing_format_for_cpu:
        module.weight.data, _ = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    kept.to(module.weight.device)
    module.weight.quant_state = module.quant_state = kept
    _keep(module)
