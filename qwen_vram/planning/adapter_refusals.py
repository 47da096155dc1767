"""Refusals of knobs that do not work with an adapter beside the base."""

from __future__ import annotations

from qwen_vram.errors import NotSupportedError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency

_MERGE = "merge it into the 16-bit base: qv.merge_lora_then_quantize(base, adapter, out)"
_WITH_PEFT = "merge it with PEFT itself (merge_and_unload), and pass the result as the model"
_TABLE, _HEAD = "model.embed_tokens", "lm_head"
# Adapters that change the base, by their setting: the text of the change, and the advice.
_BEGINS = {
    "init_lora_weights": (
        "begins with a decomposition of the base's 16-bit weights (PiSSA or OLoRA in init_lora_weights)",
        "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), which turns it into a "
        "plain LoRA",
    ),
    "kasa_config": (
        "begins with a decomposition of the base's 16-bit weights (KaSA cuts off their smallest singular values)",
        _WITH_PEFT,
    ),
}
_BLOCKS = "has block-diagonal factors (BD-LoRA in use_bdlora), which PEFT puts beside matrices in 16 or 32 bits only"


def no_adapter_beside(architecture: Architecture, profile: Profile) -> NotSupportedError | None:
    """Return the error if the adapter does not run beside the base in `profile`; `None` if it runs, or without one."""
    if not (architecture.adapter_weights or architecture.adapter_replaces):
        return None
    for knob, reason in (
        ("prefill_chunk_size", _chunks(architecture, profile)),
        ("captured", _captured(architecture, profile, "captured")),
        ("compiled", _captured(architecture, profile, "compiled")),
        ("weights", _weights(architecture, profile)),
        ("streamed_layers", _streamed(architecture, profile)),
        ("lm_head", _head(architecture, profile)),
        ("embeddings", _embeddings(architecture, profile)),
    ):
        if reason:
            value = getattr(profile, knob)
            return NotSupportedError(f"{knob}={value!r}: the adapter {reason}", knob=knob, value=value)
    return None


def _chunks(architecture: Architecture, profile: Profile) -> str:
    if profile.prefill_chunk_size is None or not architecture.adapter_activated:
        return ""
    return (
        "looks for its invocation tokens (alora_invocation_tokens) in the whole prompt, which chunks do not show it; "
        "use prefill_chunk_size=None"
    )


def _captured(architecture: Architecture, profile: Profile, knob: str) -> str:
    if not getattr(profile, knob) or not architecture.adapter_activated:
        return ""
    return (
        f"acts behind its invocation tokens only (alora_invocation_tokens), which {knob} steps do not know; use "
        f"{knob}=False"
    )


def _weights(architecture: Architecture, profile: Profile) -> str:
    if FORMATS[profile.weights].is_dense:
        return ""
    if architecture.adapter_mutates_base:
        begins, instead = _BEGINS[architecture.adapter_mutates_base]
        return f"{begins}; use weights='bf16', or {instead}"
    if architecture.adapter_in_blocks:
        return f"{_BLOCKS}; use weights='bf16', or {_WITH_PEFT}"
    matrices = {weight.name for weight in architecture.weights() if weight.is_linear and weight.role != "head"}
    replaced = [name for name in architecture.adapter_replaces if name in matrices]
    if replaced:
        return (
            f"brings {replaced[0]!r} in 16 bits, which a quantized matrix cannot take; use weights='bf16', or {_MERGE}"
        )
    return ""


def _streamed(architecture: Architecture, profile: Profile) -> str:
    if not profile.streamed_layers:
        return ""
    if architecture.adapter_layers:
        return (
            "is of a model of other layers than the base (layer_replication), which do not stream; use "
            "streamed_layers=0"
        )
    if not architecture.adapter_mutates_base:
        return ""
    begins, instead = _BEGINS[architecture.adapter_mutates_base]
    return f"{begins}, which have to be on the device; use streamed_layers=0, or {instead}"


def _head(architecture: Architecture, profile: Profile) -> str:
    if _changes(architecture, _TABLE) and residency(architecture, profile).own_head:
        return (
            f"changes {_TABLE!r}, which is this model's head too (tie_word_embeddings), and a head of its own would "
            f"not follow; leave lm_head and embeddings out, or {_MERGE}"
        )
    if profile.head_format != profile.dtype and _replaces(architecture, _HEAD):
        return (
            "brings 'lm_head.weight' or rows of it in 16 bits, which a quantized head cannot take; leave lm_head out, "
            f"save an adapter that holds the base's own head with save_embedding_layers=False, or {_MERGE}"
        )
    return ""


def _embeddings(architecture: Architecture, profile: Profile) -> str:
    if not _changes(architecture, _TABLE) or not residency(architecture, profile).table_on_host:
        return ""
    return f"changes {_TABLE!r}, which PEFT does on the device only; use embeddings='device', or {_MERGE}"


def _changes(architecture: Architecture, module: str) -> bool:
    """Tell if the adapter adds to `module` or replaces it."""
    added = (weight.name for weight in architecture.adapter_weights)
    return any(name.startswith(f"{module}.") for name in (*added, *architecture.adapter_replaces))


def _replaces(architecture: Architecture, module: str) -> bool:
    """Tell if the adapter replaces the weight of `module`, or rows of it."""
    rows = f"{module}.token_adapter."
    return f"{module}.weight" in architecture.adapter_replaces or any(
        weight.name.startswith(rows) for weight in architecture.adapter_weights
    )
