"""Allocations of loading a 16-bit checkpoint in their order, for the replay.

Source of the order: transformers 5.17 and 5.23 (core_model_loading.py, `caching_allocator_warmup`), bitsandbytes 0.50.2
(functional.py, `quantize_4bit` and `quantize_blockwise`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

from qwen_vram.arithmetic.replay.allocator import CachingAllocator
from qwen_vram.arithmetic.tiling import chunk_rows, tile_rows
from qwen_vram.arithmetic.weights import format_of, slot_bytes, streaming_slots
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import BLOCK, FORMATS, StorageFormat, blocks
from qwen_vram.spec.layers import Weight
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency

_FP32 = 4
_FP16 = 2
# Knobs that do not change a load, with their defaults: profiles that differ only in these share one replay.
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
    """Return the profile with the default of every knob that does not change a load."""
    return replace(profile, **_NOT_LOADED)


@lru_cache(maxsize=64)
def replay_load(architecture: Architecture, profile: Profile, limit: int | None = None) -> CachingAllocator:
    """Return the allocator after a load: its `allocated` is that of the weights, its `peak` the load peak.

    Raises:
        OverLimitError: loading needs more than `limit` bytes.
    """
    allocator = CachingAllocator(limit)
    load_into(allocator, architecture, profile)
    return allocator


def load_into(allocator: CachingAllocator, architecture: Architecture, profile: Profile) -> None:
    """Load through `allocator`, in place.

    `transformers` first allocates all bytes in one piece and frees them, so that later requests are cut from it. Then
    it copies tensors in the order of their names: as they are stored, or in the model's own dtype, to quantize each one
    at once. In the end the loader returns unused segments.

    Raises:
        OverLimitError: loading needs more than the allocator's limit.
    """
    if architecture.stored:
        from qwen_vram.arithmetic.replay.load_prequantized import replay_stored  # only for such checkpoints

        replay_stored(allocator, architecture, architecture.stored, profile)
        allocator.loaded()
        return
    weights = _load_order(architecture, profile)
    counts = Counter(weights)  # equal layers have equal weights
    total = sum(count * _announced_bytes(weight, profile) for weight, count in counts.items())
    allocator.give(allocator.take(int(total)))
    plain = {weight: weight.numel * profile.element_bytes for weight in counts if _is_plain(weight, profile)}
    load = _load_weight if architecture.stored_format is None else _load_stored
    for weight in weights:
        if weight in plain:
            allocator.take(plain[weight])
        else:
            load(allocator, weight, profile)
    for _ in range(2 if architecture.starts else 0):  # the rotary embedding's float32 buffers
        allocator.take(architecture.rotary_dim // 2 * _FP32)
    if profile.streamed_layers:
        _load_streamed(allocator, architecture, profile)
    allocator.loaded()


def _load_streamed(allocator: CachingAllocator, architecture: Architecture, profile: Profile) -> None:
    """Quantize a head in tiles, which stays; quantize streamed matrices, which are freed; then allocate the slots.

    Matrices that are stored in a quantized format are read from the file to the host.
    """
    if residency(architecture, profile).late_head:
        _load_by_tiles(allocator, architecture.head, profile)
    for layer, _ in architecture.kinds:
        for weight in layer.linears.values():
            if architecture.stored_format is None and not FORMATS[format_of(weight, profile)].is_dense:
                allocator.give(*_load_by_tiles(allocator, weight, profile))
    allocator.release_unused()
    for _ in range(streaming_slots(architecture, profile)):
        allocator.take(slot_bytes(architecture, profile))


def _load_by_tiles(allocator: CachingAllocator, weight: Weight, profile: Profile) -> list[int]:
    """Quantize a weight tile by tile into its codes and scales; return the blocks that hold it then."""
    storage = FORMATS[format_of(weight, profile)]
    if not storage.is_bnb:
        return _load_weight(allocator, weight, profile)
    rows, columns = tile_rows(*weight.shape), weight.shape[1]
    sizes, maxima = storage.sizes(weight.shape), blocks(weight.numel) * _FP32
    scales = sizes["SCB"] if storage.has_outliers else maxima
    kept = [allocator.take(sizes["weight"]), allocator.take(scales)]
    tile = [allocator.take(rows * columns * (_FP16 if storage.has_outliers else profile.element_bytes))]
    tile += [allocator.take(rows * columns * storage.bits // 8), allocator.take(rows * columns // BLOCK * _FP32)]
    allocator.give(*tile)
    if storage.is_double:
        offset, centred = allocator.take(sizes["offset"]), allocator.take(maxima)
        nested = [allocator.take(sizes[name]) for name in ("state2.absmax", "absmax", "state2.code")]
        allocator.give(centred, kept.pop())
        kept += [offset, *nested]
    if storage.is_bnb_4bit:
        kept.append(allocator.take(sizes["code"]))
    return kept


def _load_order(architecture: Architecture, profile: Profile) -> list[Weight]:
    """The weights that stay on the device, sorted by name as in `transformers`: head, embedding, layers, last norm."""
    outer = {weight.role: [weight] for weight in architecture.outer}
    by_name = {
        layer: sorted(layer.weights, key=lambda weight: weight.name.split(".")) for layer, _ in architecture.kinds
    }
    homes = residency(architecture, profile)
    staying = [layer for layer, home in zip(architecture.layers, homes.layers, strict=True) if home == "device"]
    layers = [weight for layer in staying for weight in by_name[layer]]
    head = outer.get("head", [])
    if architecture.has_head and homes.own_head:
        head = [architecture.head]
    if homes.late_head:
        head = []  # it is loaded afterwards
    table = [] if homes.table_on_host else outer.get("embedding", [])
    return [*head, *table, *layers, *outer.get("norm", []), *architecture.adapter_weights]


def _is_plain(weight: Weight, profile: Profile) -> bool:
    """Tell if a weight is copied in a plain dtype, and stays so."""
    return FORMATS[format_of(weight, profile)].is_dense


def _announced_bytes(weight: Weight, profile: Profile) -> float:
    """Bytes that `transformers` expects for a weight: code bits only, and scales if a model declares them."""
    storage = FORMATS[format_of(weight, profile)]
    if storage.is_weight_only:
        return storage.nbytes(weight.shape)
    return weight.numel * storage.bits / 8


def _load_stored(allocator: CachingAllocator, weight: Weight, profile: Profile) -> None:
    """Copy the parts one by one; they stay.

    Small temporary tensors are not counted: bitsandbytes' JSON text (512 bytes), and a chunk of int4's codes in its
    kernel's order (2 MiB), after all are copied.
    """
    for nbytes in FORMATS[format_of(weight, profile)].part_sizes(weight.shape):
        allocator.take(nbytes)


def _load_weight(allocator: CachingAllocator, weight: Weight, profile: Profile) -> list[int]:
    """Copy a weight and quantize it; return the blocks that hold it then."""
    storage = FORMATS[format_of(weight, profile)]
    arriving = allocator.take(weight.numel * profile.element_bytes)
    if storage.is_dense:
        return [arriving]
    sizes = storage.sizes(weight.shape)
    if storage.is_double:
        in_float = blocks(weight.numel) * _FP32
        maxima = allocator.take(in_float)
        kept = [allocator.take(sizes[name]) for name in ("weight", "code", "offset")]
        centred = allocator.take(in_float)
        kept += [allocator.take(sizes[name]) for name in ("state2.absmax", "absmax", "state2.code")]
        allocator.give(centred, maxima)
    elif storage.is_bnb_4bit:
        kept = [allocator.take(sizes[name]) for name in ("absmax", "weight", "code")]
    elif storage.has_outliers:
        half = allocator.take(weight.numel * _FP16)
        kept = [allocator.take(size) for size in sizes.values()]
        allocator.give(half)
    else:
        kept = [allocator.take(size) for size in sizes.values()]
        if storage.is_weight_only:
            _quantize_chunk(allocator, weight, storage)
    allocator.give(arriving)
    return kept


def _quantize_chunk(allocator: CachingAllocator, weight: Weight, storage: StorageFormat) -> None:
    """Allocate the first and largest chunk in float32; int4 searches its levels with two more such tensors."""
    elements = chunk_rows(*weight.shape) * weight.shape[1]
    chunk = [allocator.take(elements * _FP32) for _ in range(3 if storage.is_tinygemm else 1)]
    allocator.give(*chunk)
