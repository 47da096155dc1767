"""Facts of a checkpoint as a plain `from_pretrained` would load it here, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen_vram.checkpoints.resolve import resolve
from qwen_vram.diagnosis.machine_facts import MachineFacts
from qwen_vram.diagnosis.model_facts import Generation, Matrix, ModelFacts, Role
from qwen_vram.dtypes import FP32
from qwen_vram.planning.capacity.hardware import AMPERE
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.layers import Weight

_ROLES: Mapping[str, Role] = {"attention": "layer", "mlp": "layer", "head": "head", "embedding": "embedding"}


def examine_stored(model: str | Path | Architecture, machine: MachineFacts) -> ModelFacts:
    """Return the facts of a checkpoint that is loaded plainly: on the first GPU if there is one, in its own dtype.

    Raises:
        UnknownNameError, ConfigError, CheckpointError, HubError: as `estimate_vram`.
    """
    found = resolve(model)
    architecture = found.architecture
    device = "cuda" if machine.gpus else "cpu"
    config = dict(found.config) or _config(architecture)
    matrices = tuple(_matrices(architecture))
    dense = FORMATS[architecture.dtype]
    norms = sum(dense.nbytes(one.shape) for one in architecture.weights() if len(one.shape) < 2)
    total = sum(one.nbytes for one in matrices) + norms
    backend, reason = _sdpa(architecture, machine) if device == "cuda" else ("", "")
    return ModelFacts(
        label=found.label,
        is_live=False,
        config=config,
        kind=architecture.model_type,
        device=device,
        dtype=architecture.dtype,
        matrices=matrices,
        weight_bytes=total,
        resident_bytes=total,
        sdpa_backend=backend,
        sdpa_reason=reason,
        generation=Generation(use_cache=config.get("use_cache") is not False),
    )


def _config(architecture: Architecture) -> dict[str, object]:
    """The configuration of a model in the catalog, whose config.json was not read."""
    layer = architecture.layers[0]
    mlp = next(one for one in layer.weights if one.module == "up_proj")
    return {
        "model_type": architecture.model_type,
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_attention_heads": layer.attention.heads,
        "num_key_value_heads": layer.attention.key_value_heads,
        "head_dim": layer.attention.head_dim,
        "intermediate_size": mlp.shape[0],
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "tie_word_embeddings": architecture.tie_word_embeddings,
    }


def _matrices(architecture: Architecture) -> Iterator[Matrix]:
    """Yield the matrices as `transformers` loads them: in the checkpoint's dtype, or as they are stored."""
    stored = architecture.stored
    dense = FORMATS[architecture.dtype]
    row = FORMATS[architecture.stored_format or architecture.dtype]
    for weight in architecture.weights():
        if len(weight.shape) != 2:
            continue
        coded = architecture.stored_format is not None and _is_coded(weight, architecture)
        nbytes = stored.matrix(weight.name) if stored and coded else dense.nbytes(weight.shape)
        yield Matrix(
            name=weight.name,
            shape=weight.shape,
            nbytes=nbytes,
            dtype=architecture.dtype,
            role=_ROLES.get(weight.role, "other"),
            codes=row.quant_type if coded and row.is_bnb_4bit else "",
            is_dense=not coded,
            is_double=coded and row.is_double,
        )


def _is_coded(weight: Weight, architecture: Architecture) -> bool:
    return weight.is_linear and (weight.role != "head" or architecture.stored_head)


def _sdpa(architecture: Architecture, machine: MachineFacts) -> tuple[str, str]:
    """Return the kernel that torch runs on the first GPU, by its rules; empty if the driver does not tell enough."""
    capability = machine.gpus[0].capability
    grouped = any(layer.attention.is_grouped for layer in architecture.layers)
    # Only flash and cuDNN take grouped heads.
    # Source: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_batch_size_and_num_heads_dense).
    kernel = "MATH" if grouped else "EFFICIENT_ATTENTION"
    if capability is not None and capability < AMPERE:
        return kernel, f"compute capability {capability[0]}.{capability[1]} is below 8.0 (Ampere)"
    if architecture.dtype == FP32.name:
        return kernel, "the model is in float32, and the flash kernel takes 16 bits"
    return "", ""
