"""Names of a checkpoint's tensors, mapped to the model's as by `transformers`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from qwen_vram.checkpoints.files.safetensors_header import Tensor

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = "model."
_TWICE = (f"{BASE}{BASE}", f"{BASE}lm_head.")
_IN_BASE = ("embed_tokens.", "layers.", "norm.")


def model_name(name: str) -> str:
    """Return the model's name of a tensor, as `transformers` maps it.

    `model.` is added if it is missing, and removed if it is there twice or before the head.

    Source: transformers 5.23, core_model_loading.rename_source_key.

    >>> model_name("layers.0.mlp.up_proj.weight"), model_name("model.lm_head.weight")
    ('model.layers.0.mlp.up_proj.weight', 'lm_head.weight')
    """
    if name.startswith(BASE):
        return name.removeprefix(BASE) if name.startswith(_TWICE) else name
    return f"{BASE}{name}" if name.startswith(_IN_BASE) else name


def by_model_name(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by the model's names, and the names that two tensors would have."""
    named = {model_name(name): tensor for name, tensor in tensors.items()}
    if len(named) == len(tensors):
        return named, []
    counts = Counter(map(model_name, tensors))
    return named, [name for name, count in counts.items() if count > 1]
