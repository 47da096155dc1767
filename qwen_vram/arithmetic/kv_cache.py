"""Bytes of the KV cache, by format, kind and device."""

from __future__ import annotations

from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import LayerSpec
from qwen_vram.spec.profile import Profile

# Layers of a host cache that are on the device: the one that computes, and the one that is copied.
HOST_CACHE_LAYERS = 2


def kv_bytes_per_token(architecture: Architecture, profile: Profile) -> int:
    """Bytes of one token's keys and values in all layers, in the model's own dtype.

        the sum over the layers of 2 (K and V) x key_value_heads x head_dim x element bytes

    Exact.

    >>> from qwen_vram.spec.catalog import find
    >>> kv_bytes_per_token(find("Qwen2.5-7B-Instruct"), Profile())
    57344
    """
    width = sum(count * layer.attention.key_value_width for layer, count in architecture.kinds)
    return 2 * width * profile.element_bytes


def layer_kv_bytes(layer: LayerSpec, profile: Profile, *, tokens: int, batch_size: int) -> int:
    """Bytes of a layer's keys and values for `tokens` tokens of each sequence, in the cache's format.

    Exact.
    """
    return batch_size * profile.kv_format.nbytes(
        tokens,
        kv_heads=layer.attention.key_value_heads,
        head_dim=layer.attention.head_dim,
        element_bytes=profile.element_bytes,
    )


def all_kv_bytes(architecture: Architecture, profile: Profile, *, tokens: int, batch_size: int) -> int:
    """The sum of `layer_kv_bytes` over all layers. Exact."""
    return sum(
        count * layer_kv_bytes(layer, profile, tokens=tokens, batch_size=batch_size)
        for layer, count in architecture.kinds
    )


def largest_kv_bytes(architecture: Architecture, profile: Profile, *, tokens: int, batch_size: int) -> int:
    """`layer_kv_bytes` of the layer with the most bytes. Exact."""
    return max(layer_kv_bytes(layer, profile, tokens=tokens, batch_size=batch_size) for layer, _ in architecture.kinds)


def kv_cache_bytes(
    architecture: Architecture, profile: Profile, *, tokens: int, batch_size: int, context_len: int
) -> int:
    """Bytes on the device if `tokens` of each sequence's `context_len` tokens are cached.

    A dynamic cache has memory for the cached tokens; the others have memory for the whole context from the start, and
    pages for that of every sequence.
    """
    if profile.cache == "paged":
        from qwen_vram.spec.batching.pages import pool_tokens  # a first estimate without pages starts sooner

        return all_kv_bytes(architecture, profile, tokens=pool_tokens(batch_size, context_len), batch_size=1)
    held = tokens if profile.cache == "dynamic" else context_len
    if profile.kv_device == "host":
        slots = min(architecture.num_hidden_layers, HOST_CACHE_LAYERS)
        return slots * largest_kv_bytes(architecture, profile, tokens=held, batch_size=batch_size)
    return all_kv_bytes(architecture, profile, tokens=held, batch_size=batch_size)


def host_kv_bytes(architecture: Architecture, profile: Profile, *, batch_size: int, context_len: int) -> int:
    """Bytes of pinned host memory for a cache on the host; 0 for a cache on the device.

    A layer is one block, which torch rounds up to a power of two.
    Source: torch 2.11, aten/src/ATen/core/CachingHostAllocator.h.
    """
    if profile.kv_device == "device":
        return 0
    total = 0
    for layer, count in architecture.kinds:
        nbytes = layer_kv_bytes(layer, profile, tokens=context_len, batch_size=batch_size)
        total += count * (1 << (nbytes - 1).bit_length())
    return total
