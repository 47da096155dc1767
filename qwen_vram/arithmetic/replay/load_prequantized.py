"""Allocations of loading a prequantized checkpoint in their order, for the replay.

Source of the order: transformers 5.23 (core_model_loading.py, `caching_allocator_warmup`); tensors are copied as they
are stored. The later allocations depend on the kernel that the kernel library chooses (GPTQModel's Marlin and ExLlama
repack codes, one matrix at a time). One tensor beside all others is counted, the largest of layers and quantized head.
Not measured.
"""

from __future__ import annotations

from qwen_vram.arithmetic.replay.allocator import CachingAllocator
from qwen_vram.arithmetic.weights import streaming_slots
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.prequantized import Stored
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency

_FP32 = 4


def replay_stored(allocator: CachingAllocator, architecture: Architecture, stored: Stored, profile: Profile) -> None:
    """Load through `allocator`. Its `allocated` is then that of the weights, and its `peak` bounds the load peak."""
    homes = residency(architecture, profile)
    table = () if homes.table_on_host else stored.embedding
    layers = [
        tensor
        for layer in stored.on_device(len(homes.streamed), streaming_slots(architecture, profile))
        for tensor in layer
    ]
    sizes = [tensor.nbytes for tensor in (*stored.head, *table, *layers, *stored.norm)]
    sizes += [weight.numel * profile.element_bytes for weight in architecture.adapter_weights]
    allocator.give(allocator.take(sum(sizes)))
    for nbytes in sizes:
        allocator.take(nbytes)
    packed = (*layers, *(stored.head if architecture.stored_head else ()))
    allocator.give(allocator.take(max(tensor.nbytes for tensor in packed)))
    for _ in range(2 if architecture.starts else 0):  # the rotary embedding's float32 buffers
        allocator.take(architecture.rotary_dim // 2 * _FP32)
