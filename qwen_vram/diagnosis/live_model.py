"""Facts of a live model, which `transformers` or this library loaded.

Nothing in the model changes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_vram.diagnosis.live_tensors import dtype_name, matrices_of, output_of, tensor_bytes
from qwen_vram.diagnosis.model_facts import Generation, ModelFacts, Offload
from qwen_vram.diagnosis.offload_hooks import offload_of
from qwen_vram.errors import ConfigError
from qwen_vram.runtime.loaded_model import LoadedModel
from qwen_vram.spec.profile import Profile

# Rows, columns and inner size of the product that measures a device's rate.
_PRODUCT = (256, 1024, 1024)
# The flash kernel's own limit. Source: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
_LARGEST_HEAD = 256
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size")


def examine_model(model: object, *, rows: int, masked: bool) -> ModelFacts:
    """Return the facts of a live model.

    Args:
        model: A causal model of `transformers`, or a `LoadedModel`.
        rows: Tokens of a prompt, for which torch is asked which attention kernel it would run.
        masked: Attention gets a mask.

    Raises:
        ConfigError: it is no model with a configuration.
    """
    module = model.model if isinstance(model, LoadedModel) else model
    config = getattr(module, "config", None)
    if not isinstance(module, nn.Module) or not hasattr(config, "get_text_config"):
        raise ConfigError(
            f"doctor takes a live model of transformers, a LoadedModel, a folder or a name, got {type(model).__name__}"
        )
    text = config.get_text_config()  # type: ignore[union-attr]
    facts = {**text.to_dict(), **_sizes(text)}
    device, dtype = _device(module), _dtype(module)
    attention = getattr(text, "_attn_implementation", None) or "eager"
    if not facts.get("num_attention_heads"):
        attention = "none"  # a model without softmax attention
    profile = model.plan.profile if isinstance(model, LoadedModel) else None
    generation = _generation(module) if profile is None else _planned(profile)
    backend, reason = "", ""
    if attention == "sdpa" and device != "meta":
        backend, reason = _sdpa(facts, device, dtype, min(rows, 256), masked)
    return ModelFacts(
        label=_label(config, module),
        is_live=True,
        profile=profile,
        config=facts,
        kind=str(facts.get("model_type", "")),
        device=device,
        gpus=len({one.device for one in module.parameters() if one.is_cuda}) or 1,
        dtype=dtype_name(dtype),
        matrices=tuple(matrices_of(module)),
        weight_bytes=tensor_bytes(module),
        resident_bytes=tensor_bytes(module, device),
        attention=attention,
        sdpa_backend=backend,
        sdpa_reason=reason,
        generation=generation,
        offload=offload_of(module) if profile is None else Offload(),
        gradients=sum(one.grad.nbytes for one in module.parameters() if one.grad is not None),
        head_copy=_head_copy(module, text),
        has_conv3d=any(isinstance(one, nn.Conv3d) for one in module.modules()),
        product_rate=None if generation.use_cache or device == "meta" else _product_rate(device, dtype),
    )


def _sizes(config: Any) -> dict[str, Any]:
    """Sizes under their common names, which older families store under names of their own."""
    found = {name: getattr(config, name, None) for name in _SIZES}
    return {name: value for name, value in found.items() if value is not None}


def _label(config: Any, module: nn.Module) -> str:
    """The model's name without a folder: a hub id, or the last part of a path."""
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return type(module).__name__
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _device(module: nn.Module) -> str:
    """The kind of device that computes: of the first tensor that is on one, or of a hook that moves tensors to it."""
    for tensor in module.parameters():
        if not tensor.is_meta:
            return tensor.device.type
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device if isinstance(device, (str, torch.device)) else f"cuda:{device}").type
    return "meta"


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the activations: that of the first floating-point parameter."""
    return next((one.dtype for one in module.parameters() if one.is_floating_point()), torch.get_default_dtype())


def _head_copy(model: nn.Module, config: Any) -> int:
    """Bytes of a dense head that config.json ties to the embedding, and that is a tensor of its own."""
    head = getattr(output_of(model), "weight", None)
    table = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    if not getattr(config, "tie_word_embeddings", False) or head is None or table is None or head is table:
        return 0
    if head.is_meta or table.is_meta or head.shape != table.shape or not head.is_floating_point():
        return 0
    return 0 if head.data_ptr() == table.data_ptr() else int(head.nbytes)


def _generation(model: nn.Module) -> Generation:
    settings = getattr(model, "generation_config", None)
    config = getattr(model, "config", None)
    asked = getattr(settings, "use_cache", None)
    if asked is None:
        asked = getattr(config, "use_cache", True)
    return Generation(
        use_cache=asked is not False,
        cache=str(getattr(settings, "cache_implementation", None) or ""),
        chunk=getattr(settings, "prefill_chunk_size", None),
        longest_static=int(getattr(model, "_previous_max_cache_length", 0) or 0),
    )


def _planned(profile: Profile) -> Generation:
    return Generation(cache=profile.cache, chunk=profile.prefill_chunk_size)


def _sdpa(config: Mapping[str, Any], device: str, dtype: torch.dtype, rows: int, masked: bool) -> tuple[str, str]:
    """Return the kernel that torch would run for a prompt, and the reason if it is not flash; empty if unknown."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    heads = int(config.get("num_attention_heads") or 0)
    if choose is None or not heads:
        return "", ""
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    grouped = kv_heads != heads and not masked
    query = torch.empty(1, heads, rows, head_dim, dtype=dtype, device=device)
    key = torch.empty(1, kv_heads if grouped else heads, rows, head_dim, dtype=dtype, device=device)
    mask = torch.ones(1, 1, rows, rows, dtype=torch.bool, device=device) if masked else None
    number = choose(query, key, key, mask, 0.0, not masked, enable_gqa=grouped)
    backend = torch.nn.attention.SDPBackend(number).name
    return backend, _reason(device, dtype, head_dim, masked)


def _reason(device: str, dtype: torch.dtype, head_dim: int, masked: bool) -> str:
    """The first condition of the flash kernel that does not hold, in words; empty if none is known."""
    if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        return "the flash kernel is switched off (torch.backends.cuda.enable_flash_sdp)"
    if device != "cuda":
        return ""
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0 (Ampere)"
    if dtype == torch.float32:
        return "the model is in float32, and the flash kernel takes 16 bits"
    if head_dim > _LARGEST_HEAD:
        return f"heads of {head_dim} are larger than {_LARGEST_HEAD}"
    return "there is a mask" if masked else ""


def _product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a product on a device: the best of three."""
    rows, columns, inner = _PRODUCT
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    weight = torch.ones(columns, inner, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product = nn.functional.linear(left, weight)  # as in the model: CPU kernels differ by layout
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * rows * columns * inner / best
