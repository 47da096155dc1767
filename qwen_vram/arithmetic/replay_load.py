"""Loading as a sequence of allocations, tensor by tensor, for `allocator` to follow.

Source of the order: transformers 5.17 and 5.23 (core_model_loading.py, `caching_allocator_warmup`), bitsandbytes 0.50.2
(functional.py, `quantize_4bit` and `quantize_blockwise`).
"""

from __future__ import annotations

from functools import lru_cache

from qwen_vram.arithmetic.allocator import CachingAllocator
from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.replay_stored import replay_stored
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.weights import STREAMING_SLOTS, format_of, table_on_host

_FP32 = 4
_FP16 = 2


@lru_cache(maxsize=64)
def replay_load(architecture: Architecture, profile: Profile) -> CachingAllocator:
    """The allocator after `from_pretrained`: its `allocated` is the weights', its `peak` the load peak.

    `transformers` first takes all bytes in one piece and frees them, so that later requests are cut from it; then it
    brings tensors over in the order of their names and quantizes each as it comes.
    """
    if architecture.stored:
        return replay_stored(architecture, architecture.stored, profile)
    allocator = CachingAllocator()
    weights = _load_order(architecture, profile)
    total = sum(_announced_bytes(weight, profile) for weight in weights)
    allocator.give(allocator.take(int(total)))
    for weight in weights:
        _load_weight(allocator, weight, profile)
    for _ in range(2 if architecture.starts else 0):  # the rotary embedding's float32 buffers
        allocator.take(architecture.head_dim // 2 * _FP32)
    return allocator


def _load_order(architecture: Architecture, profile: Profile) -> list[Weight]:
    """What goes to the device, sorted by name as `transformers` does: head, embedding, layers, last norm."""
    outer = {weight.role: [weight] for weight in architecture.outer}
    block = sorted(architecture.block, key=lambda weight: weight.name.split("."))
    streamed = min(profile.streamed_layers, architecture.num_hidden_layers)
    layers = architecture.num_hidden_layers - streamed + min(streamed, STREAMING_SLOTS)
    head = outer.get("head", [])
    if architecture.has_head and architecture.tie_word_embeddings and profile.head_format != profile.dtype:
        head = [architecture.head]
    table = [] if table_on_host(architecture, profile) else outer.get("embedding", [])
    return [*head, *table, *(block * layers), *outer.get("norm", []), *architecture.adapter_weights]


def _announced_bytes(weight: Weight, profile: Profile) -> float:
    """What `transformers` expects a weight to take: code bits alone, block maxima left out."""
    storage = FORMATS[format_of(weight, profile)]
    return weight.numel * storage.bits / 8


def _load_weight(allocator: CachingAllocator, weight: Weight, profile: Profile) -> None:
    storage = FORMATS[format_of(weight, profile)]
    arriving = allocator.take(weight.numel * profile.element_bytes)
    if storage.is_dense:
        return
    blocks = -(-weight.numel // 64)
    if storage.name in ("nf4", "fp4"):
        maxima = allocator.take(blocks * _FP32)
        allocator.take(-(-weight.numel // 2))
        allocator.take(64)  # code
        allocator.take(_FP32)  # offset
        centred = allocator.take(blocks * _FP32)
        allocator.take(-(-blocks // 256) * _FP32)
        allocator.take(blocks)
        allocator.take(1024)  # code of the maxima
        allocator.give(centred, maxima)
    elif storage.name == "nf4-plain":
        allocator.take(blocks * _FP32)
        allocator.take(-(-weight.numel // 2))
        allocator.take(64)
    elif storage.name == "int8":
        half = allocator.take(weight.numel * _FP16)
        for size in storage.part_sizes(weight.shape):
            allocator.take(size)
        allocator.give(half)
    else:
        for size in storage.part_sizes(weight.shape):
            allocator.take(size)
    allocator.give(arriving)
