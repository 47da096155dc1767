"""Check of a prequantized checkpoint's tensors: name, dtype and shape.

All tensors that a loaded matrix computes with must come from the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors import prequantized_advice as advice
from qwen_vram.checkpoints.tensors.prequantized_matrix import Matrix, Part, matrix_of, plain
from qwen_vram.checkpoints.tensors.quantized_names import head_is_quantized, quantizer_of
from qwen_vram.errors import CheckpointError, ConfigError, QwenVramError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.layers import Weight
from qwen_vram.spec.prequantized import Stored, StoredTensor
from qwen_vram.spec.quantization import BITSANDBYTES, METHODS, OWN_METHOD, leaving_out, method_of, settings_of

# Buffers of old checkpoints, and scales of a quantized KV cache: not loaded.
_NOT_KEPT = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".q_scale", ".kv_scale")
_SHOWN = 3


def stored_architecture(
    architecture: Architecture, quantization: object, read: Callable[[], Mapping[str, Tensor]], source: str
) -> Architecture:
    """Return `architecture` with the storage format of a quantized checkpoint, and its bytes if only headers show them.

    Args:
        quantization: The block of config.json.
        read: Returns the tensors of the checkpoint's headers.

    Raises:
        ConfigError: a quantization that this library does not load.
        CheckpointError: the headers do not match config.json. Errors of `read` are passed on.
    """
    method = method_of(quantization)
    known = method in (*METHODS, BITSANDBYTES, OWN_METHOD)
    tensors = read() if known else _if_readable(read)
    found = quantizer_of(tensors, architecture)
    matrices = [weight for weight in architecture.weights() if weight.is_linear]
    if not found and all(weight.name in tensors for weight in matrices):
        raise CheckpointError(advice.plain_weights(quantization, tensors[matrices[0].name].dtype, source), path=source)
    if not known:
        raise ConfigError(advice.not_loaded(quantization, found, tensors, source), source=source)
    reason = advice.unreadable_settings(quantization, [weight.name for weight in matrices])
    if reason:
        raise CheckpointError(f"{source}: {reason}", path=source)
    if found in advice.LOADED and method != found:
        raise CheckpointError(advice.other_quantizer(quantization, found, architecture, tensors, source), path=source)
    return _held(architecture, quantization, tensors, source)


def _if_readable(read: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the tensors of a checkpoint that will be refused, for the error's text; empty if it has no headers."""
    try:
        return read()
    except QwenVramError:
        return {}


def _held(architecture: Architecture, quantization: object, tensors: Mapping[str, Tensor], source: str) -> Architecture:
    """Return the architecture of a quantized checkpoint, with every tensor checked against config.json."""
    if architecture.tie_word_embeddings and head_is_quantized(tensors):
        # transformers uses such a head and does not tie it, because the two tables differ.
        architecture = replace(architecture, tie_word_embeddings=False)
    weights = list(architecture.weights())
    matrices = {
        weight.name: matrix_of(weight, quantization, tensors) if weight.is_linear else plain(weight)
        for weight in weights
    }
    _check_missing(weights, matrices, tensors, source)
    for weight in weights:
        _check_parts(weight, matrices[weight.name], tensors, source)
    _check_left_out(weights, matrices, quantization, source)
    quantized = {weight.name: matrices[weight.name] for weight in weights if matrices[weight.name].format is not None}
    name = Counter(matrix.format for matrix in quantized.values()).most_common(1)[0][0]
    architecture = replace(architecture, stored_format=name, stored_head="lm_head.weight" in quantized)
    if _is_uniform(architecture, matrices, tensors):
        return architecture
    return replace(architecture, stored=_sort(architecture, matrices, tensors, source))


def _check_missing(
    weights: Iterable[Weight], matrices: Mapping[str, Matrix], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Refuse weights without any tensor in the files."""
    missing = [
        weight.name for weight in weights if not any(part.name in tensors for part in matrices[weight.name].parts)
    ]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint of {source} lacks {', '.join(missing[:_SHOWN])}{more}; config.json and weights are of "
            "different models, or a file is missing",
            path=source,
        )


def _check_parts(weight: Weight, matrix: Matrix, tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that all tensors of one weight are there, with their dtypes and shapes."""
    missing = [part for part in matrix.parts if part.name not in tensors and not part.optional]
    if missing:
        raise CheckpointError(advice.missing_parts(weight, matrix, missing, tensors, source), path=source)
    for part in matrix.parts:
        held = tensors.get(part.name)
        if held is not None and not part.fits(held):
            raise CheckpointError(advice.wrong_part(weight, matrix, part, held, source), path=source)


def _check_left_out(
    weights: Iterable[Weight], matrices: Mapping[str, Matrix], quantization: object, source: str
) -> None:
    """Check that the matrices which config.json leaves out, and no others, are not quantized."""
    method, plain_ones = method_of(quantization), []
    if method not in advice.LISTS:
        return
    for weight in weights:
        name, module = matrices[weight.name].format, weight.name.removesuffix(".weight")
        if not weight.is_linear:
            continue
        key = leaving_out(quantization, module)
        if name is None and not key:
            plain_ones.append(module)
        if name is not None and key and key != "lm_head":
            raise CheckpointError(advice.left_out_and_quantized(module, key, name, source), path=source)
        eight = bool(settings_of(quantization).get("load_in_8bit"))
        if method == BITSANDBYTES and name is not None and eight != FORMATS[name].has_outliers:
            raise CheckpointError(advice.other_bits(weight, name, source), path=source)
    if plain_ones:
        raise CheckpointError(advice.not_left_out(plain_ones, quantization, source), path=source)


def _is_uniform(architecture: Architecture, matrices: Mapping[str, Matrix], tensors: Mapping[str, Tensor]) -> bool:
    """Tell if the sums of one storage format give the bytes of every matrix, so that counting needs no headers."""
    storage = FORMATS[str(architecture.stored_format)]
    if not storage.is_quantized_on_load:
        return False
    for weight in architecture.weights():
        matrix = matrices[weight.name]
        if not weight.is_linear or (weight.role == "head" and matrix.format is None):
            continue
        kept = [tensor.nbytes for part in matrix.parts if (tensor := part.loaded(tensors)) is not None]
        if matrix.format != storage.name or sorted(kept) != sorted(storage.part_sizes(weight.shape)):
            return False
    return True


def _sort(
    architecture: Architecture, matrices: Mapping[str, Matrix], tensors: Mapping[str, Tensor], source: str
) -> Stored:
    """Return the tensors that the loaded model keeps, by part, sorted by name."""
    layers: list[list[StoredTensor]] = [[] for _ in range(architecture.num_hidden_layers)]
    outer: dict[str, list[StoredTensor]] = {"model.embed_tokens": [], "model.norm": [], "lm_head": []}
    parts = [part for matrix in matrices.values() for part in matrix.parts]
    _check_places(architecture, parts, tensors, source)
    kept = [tensor for part in parts if (tensor := part.loaded(tensors)) is not None]
    for tensor in sorted(kept, key=lambda tensor: tensor.name.split(".")):
        module = next((name for name in outer if tensor.name.startswith(f"{name}.")), None)
        (outer[module] if module else layers[int(tensor.name.split(".")[2])]).append(tensor)
    return Stored(
        embedding=tuple(outer["model.embed_tokens"]),
        layers=tuple(tuple(layer) for layer in layers),
        norm=tuple(outer["model.norm"]),
        head=tuple(outer["lm_head"]),
    )


def _check_places(
    architecture: Architecture, parts: Iterable[Part], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Refuse a tensor that belongs to no module of the model."""
    names = {part.name for part in parts}
    modules = {name.rpartition(".")[0] for name in names} | {"lm_head"}
    for name in tensors:
        # AutoGPTQ stored a bias of zeros for every matrix; transformers creates those that the model has.
        if name in names or name.endswith((*_NOT_KEPT, ".bias")):
            continue
        if not any(prefix in modules for prefix in _prefixes(name)):
            raise CheckpointError(
                f"{source} describes a dense {architecture.model_type} of {architecture.num_hidden_layers} layers, "
                f"whose checkpoint has no place for {name!r}; config.json and weights are of different models",
                path=source,
            )


def _prefixes(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
