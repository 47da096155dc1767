"""A LoRA adapter beside its base, run by PEFT in the model's own dtype."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from qwen_vram.errors import BackendUnavailableError

_INSTALL = 'pip install "qwen-vram[lora]"'


def check_peft() -> None:
    """Refuse an adapter where PEFT is missing.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    if find_spec("peft") is None:
        raise BackendUnavailableError(
            f"adapter=... needs peft, which is not installed; run: {_INSTALL}", backend="peft", install=_INSTALL
        )


def add_adapter(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A `PeftModel` of `model` and the adapter in `folder`.

    PEFT keeps adapters in float32 by default, and casts every input to that; here they take the model's dtype, as the
    estimator counts them.
    """
    from peft import PeftModel

    adapted: nn.Module = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return adapted
