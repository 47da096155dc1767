"""Allocations of loading a 16-bit checkpoint in their order, for the replay.

Source of the order: transformers 5.17 and 5.23 (core_model_loading.py, `caching_allocator_warmup`), bitsandbytes 0.50.2
(functional.py, `quantize_4bit` and `quantize_blockwise`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from qwen_vram.arithmetic.replay.allocator import CachingAllocator
from qwen_vram.arithmetic.replay.load_prequantized import replay_stored
from qwen_vram.arithmetic.tiling import chunk_rows, tile_rows
from qwen_vram.arithmetic.weights import block_bytes, format_of, streaming_slots
from qwen_vram.spec.architecture import Architecture, Weight
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency

_FP32 = 4
_FP16 = 2
# Knobs that change nothing about a load, at their defaults: profiles that differ in them alone share one replay.
_NOT_LOADED: dict[str, Any] = {
    "name": "custom",
    "kv_cache": "bf16",
    "kv_device": "device",
    "cache": "dynamic",
    "attention": "sdpa",
    "kernels": "plain",
    "prefill_chunk_size": None,
    "dequantization": None,
    "captured": False,
    "compiled": False,
}


@lru_cache(maxsize=256)
def as_loaded(profile: Profile) -> Profile:
    """Return the profile with every knob that changes nothing about a load at its default."""
    return replace(profile, **_NOT_LOADED)


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
        allocator.loaded()
        return allocator
    weights = _load_order(architecture, profile)
    total = sum(_announced_bytes(weight, profile) for weight in weights)
    allocator.give(allocator.take(int(total)))
    load = _load_weight if architecture.stored_format is None else _load_stored
    for weight in weights:
        load(allocator, weight, profile)
    for _ in range(2 if architecture.starts else 0):  # the rotary embedding's float32 buffers
        allocator.take(architecture.head_dim // 2 * _FP32)
    if profile.streamed_layers:
        _load_streamed(allocator, architecture, profile)
    allocator.loaded()
    return allocator


def _load_streamed(allocator: CachingAllocator, architecture: Architecture, profile: Profile) -> None:
    """A quantized head is built by tiles and stays, streamed matrices leave again, and then the slots are taken.

    What is stored quantized goes from the file to the host at once.
    """
    if residency(architecture, profile).late_head:
        _load_by_tiles(allocator, architecture.head, profile)
    for weight in architecture.block:
        if architecture.stored_format is None and not FORMATS[format_of(weight, profile)].is_dense:
            allocator.give(*_load_by_tiles(allocator, weight, profile))
    allocator.release_unused()
    for _ in range(streaming_slots(architecture, profile)):
        allocator.take(block_bytes(architecture, profile))


def _load_by_tiles(allocator: CachingAllocator, weight: Weight, profile: Profile) -> list[int]:
    """Quantize a weight tile by tile into its codes and scales; the blocks that hold it then."""
    storage = FORMATS[format_of(weight, profile)]
    if storage.library != "bitsandbytes":
        return _load_weight(allocator, weight, profile)
    rows, columns = tile_rows(*weight.shape), weight.shape[1]
    blocks = -(-weight.numel // 64)
    scales = weight.shape[0] if storage.name == "int8" else blocks
    kept = [allocator.take(-(-weight.numel * storage.bits // 8)), allocator.take(scales * _FP32)]
    tile = [allocator.take(rows * columns * (_FP16 if storage.name == "int8" else profile.element_bytes))]
    tile += [allocator.take(rows * columns * storage.bits // 8), allocator.take(rows * columns // 64 * _FP32)]
    allocator.give(*tile)
    if storage.is_double:
        offset, centred = allocator.take(_FP32), allocator.take(blocks * _FP32)
        nested = [allocator.take(-(-blocks // 256) * _FP32), allocator.take(blocks), allocator.take(1024)]
        allocator.give(centred, kept.pop())
        kept += [offset, *nested]
    if storage.bits == 4:
        kept.append(allocator.take(64))  # code
    return kept


def _load_order(architecture: Architecture, profile: Profile) -> list[Weight]:
    """What goes to the device to stay, sorted by name as `transformers` does: head, embedding, layers, last norm."""
    outer = {weight.role: [weight] for weight in architecture.outer}
    block = sorted(architecture.block, key=lambda weight: weight.name.split("."))
    homes = residency(architecture, profile)
    head = outer.get("head", [])
    if architecture.has_head and homes.own_head:
        head = [architecture.head]
    if homes.late_head:
        head = []  # it comes afterwards
    table = [] if homes.table_on_host else outer.get("embedding", [])
    return [*head, *table, *(block * homes.resident), *outer.get("norm", []), *architecture.adapter_weights]


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


def _load_weight(allocator: CachingAllocator, weight: Weight, profile: Profile) -> list[int]:
    """Bring a weight over and quantize it; the blocks that hold it then."""
    storage = FORMATS[format_of(weight, profile)]
    arriving = allocator.take(weight.numel * profile.element_bytes)
    if storage.is_dense:
        return [arriving]
    blocks = -(-weight.numel // 64)
    if storage.is_double:
        maxima = allocator.take(blocks * _FP32)
        kept = [allocator.take(-(-weight.numel // 2))]
        kept += [allocator.take(64), allocator.take(_FP32)]  # code, offset
        centred = allocator.take(blocks * _FP32)
        kept += [allocator.take(-(-blocks // 256) * _FP32), allocator.take(blocks)]
        kept += [allocator.take(1024)]  # code of the maxima
        allocator.give(centred, maxima)
    elif storage.library == "bitsandbytes" and storage.bits == 4:
        kept = [allocator.take(size) for size in (blocks * _FP32, -(-weight.numel // 2), 64)]
    elif storage.name == "int8":
        half = allocator.take(weight.numel * _FP16)
        kept = [allocator.take(size) for size in storage.part_sizes(weight.shape)]
        allocator.give(half)
    else:
        kept = [allocator.take(size) for size in storage.part_sizes(weight.shape)]
        if storage.library == "torch":
            _quantize_chunk(allocator, weight, storage.bits)
    allocator.give(arriving)
    return kept


def _quantize_chunk(allocator: CachingAllocator, weight: Weight, bits: int) -> None:
    """The first and largest chunk in float32; int4 seeks its levels with two more such tensors."""
    elements = chunk_rows(*weight.shape) * weight.shape[1]
    chunk = [allocator.take(elements * _FP32) for _ in range(3 if bits == 4 else 1)]
    allocator.give(*chunk)
