"""Division of every layer over several GPUs, as tensor parallelism divides it.

Heads, the width of the MLP and the vocabulary are divided; norms are on every GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from qwen_vram.errors import WorkloadError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import LayerSpec, dense_layer
from qwen_vram.spec.prequantized import Stored, StoredTensor

# Rows of the vocabulary are filled up to a multiple of it before they are divided.
# Source: vLLM 0.33.0, vllm/model_executor/layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE.
VOCAB_MULTIPLE = 64


def sizes_of(architecture: Architecture, most: int) -> list[int]:
    """Return the numbers of GPUs up to `most` that divide the heads and the MLP of every layer."""
    return [size for size in range(1, most + 1) if all(_divides(layer, size) for layer, _ in architecture.kinds)]


@lru_cache(maxsize=64)
def shard(architecture: Architecture, size: int) -> Architecture:
    """Return the part of a model on each of `size` GPUs, as an `Architecture` with the weights of that GPU.

    A key-value head that several GPUs need is on each of them. Tensors of a quantized checkpoint are divided by `size`
    and rounded up, but norms are not.

    Raises:
        WorkloadError: `size` does not divide the heads or the MLP.

    Example:
        >>> from qwen_vram.spec.catalog import find
        >>> shard(find("Qwen2.5-7B-Instruct"), 2).num_parameters
        3807910400
    """
    if size == 1:
        return architecture
    for layer, _ in architecture.kinds:
        if not _divides(layer, size):
            fitting = ", ".join(map(str, sizes_of(architecture, layer.attention.heads)))
            raise WorkloadError(
                f"tensor_parallel {size} does not divide the model's {layer.attention.heads} heads, "
                f"{layer.attention.key_value_heads} key-value heads and inner size {layer.inner_size}; choose from "
                f"{fitting}",
                name="tensor_parallel",
                got=size,
            )
    parts = {layer: _part(architecture.hidden_size, layer, size) for layer, _ in architecture.kinds}
    padded = -(-architecture.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return replace(
        architecture,
        layers=tuple(parts[layer] for layer in architecture.layers),
        vocab_size=-(-padded // size),
        stored=_stored(architecture.stored, size),
    )


def _divides(layer: LayerSpec, size: int) -> bool:
    heads, shared = layer.attention.heads, layer.attention.key_value_heads
    return heads % size == 0 and layer.inner_size % size == 0 and (shared % size == 0 or size % shared == 0)


def _part(hidden_size: int, layer: LayerSpec, size: int) -> LayerSpec:
    attention = layer.attention._replace(
        heads=layer.attention.heads // size, key_value_heads=max(1, layer.attention.key_value_heads // size)
    )
    return dense_layer(hidden_size, layer.inner_size // size, attention, layer.biased)


def _stored(stored: Stored | None, size: int) -> Stored | None:
    if stored is None:
        return None

    def part(tensors: tuple[StoredTensor, ...]) -> tuple[StoredTensor, ...]:
        return tuple(one if "norm" in one.name else one._replace(nbytes=-(-one.nbytes // size)) for one in tensors)

    return Stored(part(stored.embedding), tuple(map(part, stored.layers)), part(stored.norm), part(stored.head))
