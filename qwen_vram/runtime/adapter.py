"""A LoRA adapter beside its base, run by PEFT in the model's own dtype."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from qwen_vram.arithmetic.adapter import adapter_tensors
from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.weights import head_is_a_copy, table_on_host
from qwen_vram.errors import BackendUnavailableError, NotSupportedError
from qwen_vram.runtime.backends.gptq_library import import_quietly

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


def check_adapter(folder: Path, architecture: Architecture, profile: Profile) -> None:
    """Refuse an adapter of table or head that does not go with a table on the host, or with a quantized head.

    Raises:
        NotSupportedError: naming the knob in its way.
        CheckpointError: the adapter's file is missing or broken.
    """
    merge = "or merge it into the 16-bit base: qv.merge_lora_then_quantize(base, adapter, out)"
    quantized = profile.head_format != profile.dtype
    for weight in adapter_tensors(folder):
        modules = weight.name.split(".")
        if "embed_tokens" in modules and head_is_a_copy(architecture, profile):
            raise NotSupportedError(
                f"lm_head={profile.head_format!r}: the adapter changes 'model.embed_tokens', which is this model's "
                "head too (tie_word_embeddings), and a head of its own would not follow; leave lm_head and embeddings "
                f"out, {merge}",
                knob="lm_head",
                value=profile.head_format,
            )
        if "embed_tokens" in modules and table_on_host(architecture, profile):
            raise NotSupportedError(
                "embeddings='host': the adapter changes 'model.embed_tokens', which PEFT does on the device only; use "
                f"embeddings='device', {merge}",
                knob="embeddings",
                value="host",
            )
        if "lm_head" in modules and ".lora_" not in weight.name and quantized:
            raise NotSupportedError(
                f"lm_head={profile.head_format!r}: the adapter brings {weight.name!r} in 16 bits, which a quantized "
                "head cannot take; leave lm_head out, save an adapter that holds the base's own head with "
                f"save_embedding_layers=False, {merge}",
                knob="lm_head",
                value=profile.head_format,
            )


def add_adapter(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A `PeftModel` of `model` and the adapter in `folder`.

    PEFT keeps adapters in float32 by default, and casts every input to that; here they take the model's dtype, as the
    estimator counts them.
    """
    from peft import PeftModel

    if find_spec("gptqmodel") is not None:
        import_quietly()  # or PEFT would, for any adapter

    adapted: nn.Module = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return adapted
