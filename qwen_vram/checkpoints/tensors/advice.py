"""Errors for tensors that do not match config.json, with the step that helps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_vram.checkpoints.files.absent import shown
from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors.names import HEAD, TABLE
from qwen_vram.checkpoints.tensors.wrapped_names import wrapper_of
from qwen_vram.errors import CheckpointError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.families import family_of
from qwen_vram.spec.layers import LayerSpec, Weight

# The key of config.json that sets the rows or the columns of a matrix, if it is a single key.
_ROWS = {
    "embed_tokens": "vocab_size", "lm_head": "vocab_size", "gate_proj": "intermediate_size",
    "up_proj": "intermediate_size", "down_proj": "hidden_size", "o_proj": "hidden_size", "norm": "hidden_size",
    "q_norm": "head_dim", "k_norm": "head_dim",
}  # fmt: skip
_COLUMNS = {
    "embed_tokens": "hidden_size", "lm_head": "hidden_size", "gate_proj": "hidden_size", "up_proj": "hidden_size",
    "down_proj": "intermediate_size", "q_proj": "hidden_size", "k_proj": "hidden_size", "v_proj": "hidden_size",
}  # fmt: skip


def wrong_shape(
    architecture: Architecture, weight: Weight, tensor: Tensor, tensors: Mapping[str, Tensor], folder: Path
) -> CheckpointError:
    """Return the error for a tensor of another shape than config.json says, with the key that would fit."""
    path = str(folder / tensor.file)
    if not tensor.nbytes:
        empty = [name for name, one in tensors.items() if not one.nbytes]
        return CheckpointError(
            f"{weight.name!r} is empty in {tensor.file!r} ({len(empty)} of {len(tensors)} tensors are): the model was "
            "saved under DeepSpeed ZeRO-3, whose processes hold a part each; save it with "
            "stage3_gather_16bit_weights_on_model_save true, or run the zero_to_fp32.py that DeepSpeed left beside its "
            "checkpoint: python zero_to_fp32.py . OUT --safe_serialization",
            path=path,
        )
    fitting = _fitting_key(architecture, weight, tensor)
    cure = f"if they belong together, set {fitting}" if fitting else "bring the two of one repository together"
    return CheckpointError(
        f"{weight.name!r} has shape {list(tensor.shape)} in {tensor.file!r}, config.json says {list(weight.shape)}; "
        f"config.json and weights are of different models: {cure}",
        path=path,
    )


def _fitting_key(architecture: Architecture, weight: Weight, tensor: Tensor) -> str:
    """Return the key of config.json and the value that would fit the shape; empty if no single key would."""
    if len(tensor.shape) != len(weight.shape):
        return ""
    differing = [place for place, size in enumerate(weight.shape) if tensor.shape[place] != size]
    if len(differing) != 1:
        return ""
    place, module = differing[0], weight.module
    size = tensor.shape[place]
    attention = _layer_of(architecture, weight).attention
    head_dim, heads = attention.head_dim, attention.heads
    has_key = "head_dim" in family_of(architecture.model_type).keys
    if module == "q_proj" and place == 0 and has_key and size % heads == 0:
        return f"head_dim to {size // heads}"
    if module in ("k_proj", "v_proj") and place == 0 and size % head_dim == 0 and heads % (size // head_dim) == 0:
        return f"num_key_value_heads to {size // head_dim}"
    key = (_ROWS if place == 0 else _COLUMNS).get(
        module.removeprefix("input_layer").removeprefix("post_attention_layer")
    )
    return f"{key} to {size}" if key else ""


def _layer_of(architecture: Architecture, weight: Weight) -> LayerSpec:
    """Return the layer of a weight; the first layer for a weight outside the layers."""
    names = weight.name.split(".")
    return architecture.layers[int(names[2]) if names[:2] == ["model", "layers"] else 0]


def lacking_tensors(
    architecture: Architecture, missing: list[str], tensors: Mapping[str, Tensor], folder: Path
) -> CheckpointError:
    """Return the error for tensors that the files lack, by the tensors that they hold instead."""
    wanted = {weight.name for weight in architecture.weights()}
    adapted = [name for name in tensors if ".lora_" in name]
    if adapted and any(".base_layer." in name for name in tensors):
        return CheckpointError(
            f"the weights in {str(folder)!r} are a base with an unmerged LoRA adapter (such as {adapted[0]!r}); merge "
            "it before the model is saved: model.merge_and_unload().save_pretrained(folder)",
            path=str(folder),
        )
    wrapper = wrapper_of([tensor.name for tensor in tensors.values()], wanted)
    if wrapper is not None:
        where = "every tensor's name begins with the prefix" if wrapper.leads else "the tensors' names have the prefix"
        by = f", which {wrapper.by} puts there," if wrapper.by else ""
        return CheckpointError(
            f"{where} {wrapper.text!r}{by} in {str(folder)!r}, and the model's do not; save the model that it wraps, "
            f"or take it out of the files once: {wrapper.command(str(folder))}",
            path=str(folder),
        )
    if missing == [HEAD]:
        return CheckpointError(
            f"{str(folder)!r} has no {HEAD}, and config.json says tie_word_embeddings false (its value if the key is "
            "missing); if the head is the token table, as in the smaller Qwen models, set tie_word_embeddings to true; "
            "if this is an embedding model or was saved from the base model, it has no head to write tokens with",
            path=str(folder),
        )
    layers = sorted({int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")})
    lacking = [name for name in missing if name.startswith("model.layers.")]
    if (
        layers == list(range(len(layers)))
        and {int(name.split(".")[2]) for name in lacking} == set(range(len(layers), architecture.num_hidden_layers))
        and len(lacking) == len(missing)
    ):
        return CheckpointError(
            f"{str(folder)!r} lacks {shown(missing)}: its files hold {len(layers)} decoder layers, and config.json "
            f"says num_hidden_layers {architecture.num_hidden_layers}; set that (and layer_types) to what the files "
            "hold, or bring the missing files",
            path=str(folder),
        )
    if missing == [TABLE]:
        return CheckpointError(
            f"{str(folder)!r} lacks {TABLE}, the token table; save the model again with all its weights",
            path=str(folder),
        )
    return CheckpointError(
        f"{str(folder)!r} lacks {shown(missing)}; config.json and weights are of different models, or a file of the "
        "checkpoint is missing: compare the folder with its repository, file by file",
        path=str(folder),
    )
