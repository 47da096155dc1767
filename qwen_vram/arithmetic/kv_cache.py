"""Bytes of the KV cache, by format, kind and device."""

from __future__ import annotations

from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile

# Quantized caches: keys share a scale and a least value per channel over 32 tokens, values per token and head; the
# newest 128 tokens, and those of an unfinished group, stay in the model's own dtype.
# Source of the layout: KIVI, arXiv:2402.02750.
KEY_GROUP = 32
RESIDUAL_TOKENS = 128
_FP16 = 2

# A cache on the host keeps the layer that computes and the one that is fetched on the device.
HOST_CACHE_LAYERS = 2


def kv_bytes_per_token(architecture: Architecture, profile: Profile) -> int:
    """Bytes of one token's keys and values in all layers, in the model's own dtype.

        2 (K and V) x num_hidden_layers x num_key_value_heads x head_dim x element bytes

    Exact.

    >>> from qwen_vram.spec.catalog import find
    >>> kv_bytes_per_token(find("Qwen2.5-7B-Instruct"), Profile())
    57344
    """
    return 2 * architecture.num_hidden_layers * architecture.key_value_width * profile.element_bytes


def quantized_tokens(tokens: int) -> int:
    """How many of `tokens` a quantized cache holds as codes: whole groups older than the newest 128."""
    return max(0, tokens - RESIDUAL_TOKENS) // KEY_GROUP * KEY_GROUP


def whole_tokens(context_len: int) -> int:
    """Tokens for which a quantized cache of `context_len` has room in the model's own dtype."""
    return min(context_len, RESIDUAL_TOKENS + KEY_GROUP - 1)


def layer_kv_bytes(architecture: Architecture, profile: Profile, *, tokens: int, batch_size: int) -> int:
    """Bytes that one layer's keys and values take for `tokens` tokens of each sequence, in the cache's format.

    Exact.
    """
    width = architecture.key_value_width
    if profile.kv_cache == "bf16":
        return 2 * width * tokens * batch_size * profile.element_bytes
    older = quantized_tokens(tokens)
    codes = 2 * width * older // (1 if profile.kv_cache == "int8" else 2)
    # A scale and a least value each: of keys for each channel of a group, of values for each token and head.
    levels = 2 * _FP16 * (older // KEY_GROUP * width + older * architecture.num_key_value_heads)
    newest = 2 * width * whole_tokens(tokens) * profile.element_bytes
    return (codes + levels + newest) * batch_size


def kv_cache_bytes(
    architecture: Architecture, profile: Profile, *, tokens: int, batch_size: int, context_len: int
) -> int:
    """Bytes on the device once `tokens` of each sequence are cached, of `context_len` that will be.

    A dynamic cache holds what was fed; the other two hold the whole context from the first step.
    """
    held = tokens if profile.cache == "dynamic" else context_len
    layers = architecture.num_hidden_layers
    if profile.kv_device == "host":
        layers = min(layers, HOST_CACHE_LAYERS)
    return layers * layer_kv_bytes(architecture, profile, tokens=held, batch_size=batch_size)


def host_kv_bytes(architecture: Architecture, profile: Profile, *, batch_size: int, context_len: int) -> int:
    """Bytes of pinned host memory that a cache on the host takes; 0 for one on the device.

    A layer is one block, which torch rounds up to a power of two.
    Source: torch 2.11, aten/src/ATen/core/CachingHostAllocator.h.
    """
    if profile.kv_device == "device":
        return 0
    layer = layer_kv_bytes(architecture, profile, tokens=context_len, batch_size=batch_size)
    return architecture.num_hidden_layers * (1 << (layer - 1).bit_length())
