"""The architecture of a checkpoint's files: config.json alone, or the safetensors headers too where it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.arithmetic.stored import Stored, StoredTensor, quantization_of, stored_format
from qwen_vram.errors import CheckpointError
from qwen_vram.files.header import Tensor

_FLOATS = ("BF16", "F16", "F32")
# A matrix's codes by the name that each library gives them. Source: GPTQModel and AutoAWQ (qweight), compressed-tensors
# (weight_packed, weight), transformers' FP8Linear and bitsandbytes (weight).
_CODES = ("weight", "qweight", "weight_packed")
# Buffers of old checkpoints, scales of a quantized KV cache, and bitsandbytes' note of its layout: not loaded.
_NOT_KEPT = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".weight_format")
# bitsandbytes stores the offset of double quantization in a JSON text, and keeps it as one float32.
_OFFSET = 4
_SHOWN = 3


def checkpoint_architecture(
    config: Mapping[str, object], read: Callable[[], dict[str, Tensor]], *, source: str
) -> Architecture:
    """The architecture that `config` describes, with the bytes of its tensors where only headers say them.

    Args:
        read: Brings the tensors of the checkpoint's headers; called only where they are needed.
        source: Where `config` came from.

    Raises:
        ConfigError: as `Architecture.from_config`.
        CheckpointError: the headers do not hold the model that `config` describes; and whatever `read` raises.
    """
    name, in_headers = stored_format(quantization_of(config))
    if name is None or not in_headers:
        return Architecture.from_config(config, source=source)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    architecture = Architecture.from_config(plain, source=source)
    tensors = read()
    _check(architecture, tensors, source)
    if name in ("gptq", "awq") and not any(tensor.endswith(".qweight") for tensor in tensors):
        raise CheckpointError(
            f"{source} says that {name.upper()} quantized the weights, and no tensor holds its codes ('.qweight'); "
            "take quantization_config out of config.json, or bring the quantized files",
            path=source,
        )
    stored = _sort(architecture, tensors, source)
    quantized_head = any(not _is_plain(tensor.name, tensors) for tensor in stored.head)
    return replace(architecture, stored_format=name, stored_head=quantized_head, stored=stored)


def _is_plain(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a whole matrix in a plain dtype."""
    return name.endswith(".weight") and tensors[name].dtype in _FLOATS


def _sort(architecture: Architecture, tensors: Mapping[str, Tensor], source: str) -> Stored:
    """The tensors that the loaded model keeps, by part."""
    layers: list[list[StoredTensor]] = [[] for _ in range(architecture.num_hidden_layers)]
    outer: dict[str, list[StoredTensor]] = {"model.embed_tokens": [], "model.norm": [], "lm_head": []}
    modules = {weight.name.rpartition(".")[0] for weight in architecture.weights()} | set(outer)
    for stored in _kept(architecture, tensors):
        module = next((prefix for prefix in _prefixes(stored.name) if prefix in modules), None)
        if module is None:
            raise CheckpointError(
                f"{source} describes a dense {architecture.model_type} of {architecture.num_hidden_layers} layers, "
                f"whose checkpoint has no place for {stored.name!r}; config.json and weights are of different models",
                path=source,
            )
        part = outer[module] if module in outer else layers[int(module.split(".")[2])]
        part.append(stored)
    return Stored(
        embedding=tuple(outer["model.embed_tokens"]),
        layers=tuple(tuple(layer) for layer in layers),
        norm=tuple(outer["model.norm"]),
        head=tuple(outer["lm_head"]),
    )


def _prefixes(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _kept(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Iterator[StoredTensor]:
    """What stays of the file's tensors once the model is loaded, by name as `transformers` brings them over."""
    biases = {weight.name for weight in architecture.weights() if weight.name.endswith(".bias")}
    for name in sorted(tensors, key=lambda name: name.split(".")):
        if name.endswith(_NOT_KEPT):
            continue
        # AutoGPTQ stored zeros as biases of every matrix; transformers makes those that the model has.
        if name.endswith(".bias") and name not in biases:
            continue
        if architecture.tie_word_embeddings and name == "lm_head.weight" and tensors[name].dtype in _FLOATS:
            continue
        matrix, state, _ = name.partition(".quant_state.")
        if not state:
            yield StoredTensor(name, tensors[name].nbytes)
        elif f"{matrix}.nested_absmax" in tensors:
            yield StoredTensor(name, _OFFSET)


def _check(architecture: Architecture, tensors: Mapping[str, Tensor], source: str) -> None:
    """Hold the tensors against config.json: every weight is there, whole."""
    missing = []
    for weight in architecture.weights():
        tensor = _codes(weight, tensors)
        if tensor is None:
            missing.append(weight.name)
        elif not _holds(weight, tensor):
            raise CheckpointError(
                f"{weight.name!r} has shape {list(weight.shape)} by {source}, got {list(tensor.shape)} as "
                f"{tensor.dtype} in {tensor.file!r}; config.json and weights are of different models",
                path=source,
            )
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint of {source} lacks {', '.join(missing[:_SHOWN])}{more}; config.json and weights are of "
            "different models, or a file is missing",
            path=source,
        )


def _codes(weight: Weight, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor that holds a weight, whatever its format calls it."""
    if not weight.is_linear:
        return tensors.get(weight.name)
    module = weight.name.removesuffix(".weight")
    return next((tensors[f"{module}.{name}"] for name in _CODES if f"{module}.{name}" in tensors), None)


def _holds(weight: Weight, tensor: Tensor) -> bool:
    """Whether a tensor can be the weight: its shape, or where codes are packed, one to eight bits a weight."""
    if tensor.dtype in ("I32", "U8") and weight.is_linear:
        return weight.numel <= 8 * tensor.nbytes <= 9 * weight.numel
    return tensor.shape == weight.shape
