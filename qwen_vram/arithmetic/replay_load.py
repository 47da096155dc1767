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
from qwen_vram.arithmetic.tiles import chunk_rows
from qwen_vram.arithmetic.weights import STREAMING_SLOTS, format_of, table_on_host

_FP32 = 4
_FP16 = 2


@lru_cache(maxsize=64)
def replay_load(architecture: Architecture, profile: Profile, limit: int | None = None) -> CachingAllocator:
    """The allocator after `load`: its `allocated` is the weights', its `peak` the load peak.

    `transformers` first takes all bytes in one piece and frees them, so that later requests are cut from it; then it
    brings tensors over in the order of their names, as they are stored, or in the model's own dtype to be quantized
    as they come. In the end the loader gives back what segments are free.

    Raises:
        OutOfRoomError: loading takes more than `limit`.
    """
    allocator = CachingAllocator(limit)
    if architecture.stored:
        replay_stored(allocator, architecture, architecture.stored, profile)
        allocator.release_unused()
        return allocator
    weights = _load_order(architecture, profile)
    total = sum(_announced_bytes(weight, profile) for weight in weights)
    allocator.give(allocator.take(int(total)))
    load = _load_weight if architecture.stored_format is None else _load_stored
    for weight in weights:
        load(allocator, weight, profile)
    for _ in range(2):  # the rotary embedding's float32 buffers
        allocator.take(architecture.head_dim // 2 * _FP32)
    allocator.release_unused()
    return allocator


def _load_order(architecture: Architecture, profile: Profile) -> list[Weight]:
    """What goes to the device, sorted by name as `transformers` does: head, embedding, layers, last norm."""
    outer = {weight.role: weight for weight in architecture.outer}
    block = sorted(architecture.block, key=lambda weight: weight.name.split("."))
    streamed = min(profile.streamed_layers, architecture.num_hidden_layers)
    layers = architecture.num_hidden_layers - streamed + min(streamed, STREAMING_SLOTS)
    head = [outer["head"]] if "head" in outer else []
    if architecture.tie_word_embeddings and profile.head_format != profile.dtype:
        head = [architecture.head]
    table = [] if table_on_host(architecture, profile) else [outer["embedding"]]
    return [*head, *table, *(block * layers), outer["norm"], *architecture.adapter_weights]


def _announced_bytes(weight: Weight, profile: Profile) -> float:
    """What `transformers` expects a weight to take: code bits alone, and scales where a model declares them."""
    storage = FORMATS[format_of(weight, profile)]
    if storage.library == "torch":
        return storage.nbytes(weight.shape)
    return weight.numel * storage.bits / 8


def _load_stored(allocator: CachingAllocator, weight: Weight, profile: Profile) -> None:
    """The parts come over one by one and stay.

    Left out is what goes again and is small: bitsandbytes' JSON text (512 bytes), and a chunk of int4's codes in its
    kernel's order (2 MiB), once all are there.
    """
    for nbytes in FORMATS[format_of(weight, profile)].part_sizes(weight.shape):
        allocator.take(nbytes)


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
        if storage.library == "torch":
            _quantize_chunk(allocator, weight, storage.bits)
    allocator.give(arriving)


def _quantize_chunk(allocator: CachingAllocator, weight: Weight, bits: int) -> None:
    """The first and largest chunk in float32; int4 seeks its levels with two more such tensors."""
    elements = chunk_rows(*weight.shape) * weight.shape[1]
    chunk = [allocator.take(elements * _FP32) for _ in range(3 if bits == 4 else 1)]
    allocator.give(*chunk)
