"""Times of launching kernels from Python, one by one or as a CUDA graph.

Every constant is a time on the host with the stated `layer_launch_time`; the times of another host are in proportion.
They are differences between rows of the same run if it has such rows. Hosts of one kind of GPU differ by a third.
"""

from __future__ import annotations

from functools import lru_cache

from qwen_vram.arithmetic.tiling import int8_rows, is_tiled, tile_rows, unpacks
from qwen_vram.arithmetic.timing.few_rows import by_few_rows
from qwen_vram.arithmetic.timing.linear import linear_shapes, mean_of_layers
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS, FormatName, KernelName
from qwen_vram.spec.layers import LayerSpec
from qwen_vram.spec.machine import LAYER_LAUNCH_TIME, Machine
from qwen_vram.spec.profile import Profile

_PLAIN = LAYER_LAUNCH_TIME / 1e9
# Time of `generate` beside the layers for every token, in layers.
STEP_LAYERS = 1.5
# Seconds of a product more than a 16-bit one's, by kernel. measured: NF4, H200 and H100, 34.6 and 35.8 ms a token with
# 196 of them, bf16 21.6 and 18.1; int4 16.7 on the H200 (benchmarks/results/decode.jsonl, streaming_speed.jsonl,
# 2026-11-26).
_PRODUCTS: dict[KernelName, float] = {
    "dense": 0.0,
    "bnb-4bit": 66e-6,
    "tinygemm": -7e-6,
    "dequantized": 0.0,
    "gptqmodel": 0.0,
    "plugged": 0.0,
    # Not measured: bitsandbytes launches about ten kernels, and waits for a count of outliers.
    "bnb-int8": 150e-6,
}
# Seconds of a tile, by kernel. measured: NF4, prompts in chunks of 512, 100 to 205 us on six hosts.
# int8-wo, 51.9 ms a token with 19 tiles in a layer (H200, 2026-11-29, auto_plans.jsonl; H100, 2026-11-25,
# streaming_caps.jsonl). int4 1.1 ms for 5 tiles (H100, 2026-11-25, unpack_rows.jsonl).
_TILES: dict[KernelName, float] = {"bnb-4bit": 150e-6, "dequantized": 59e-6, "tinygemm": 200e-6}
# Seconds of a product of few rows by this library's kernel more than a 16-bit one's. A token took 35.3 ms with 196 of
# them and 7 streamed layers.
# measured: H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30, default_plans.jsonl (4 GiB).
_FEW_ROWS = 70e-6
# A layer's attention by sdpa, and its dynamic cache: plain transformers took 8.0 ms (H100) and 11.0 ms (H200) more in
# bf16 (2026-11-26, decode.jsonl).
_SDPA = 150e-6
_DYNAMIC = 150e-6
# A layer's quantized cache, dequantized: 7.6 ms a token more (H100, kv_formats.jsonl) and 12.1 (H200,
# auto_plans.jsonl). Quantizing older tokens in a prefill: 87 ms more for 4 chunks, with reading.
KV_READ = 350e-6
_KV_WRITE = 400e-6
# A layer's cache on the host: 3.2 ms a token more (H100, kv_formats.jsonl).
_HOST_KV = 116e-6
# A streamed layer: CUDA events, and the binding of its tensors to another slot.
_STREAMED = 60e-6
# Attention of a chunk in parts, joined by Triton, and by torch's own operators.
_JOINED = {"fused": 120e-6, "plain": 200e-6}


def host_share(machine: Machine) -> float:
    """Return the time of launching, as a multiple of the stated host's."""
    return machine.layer_launch_time / LAYER_LAUNCH_TIME


def launch_seconds(
    architecture: Architecture,
    profile: Profile,
    rows: int,
    machine: Machine,
    *,
    batch_size: int,
    moving: int,
    prefill: bool,
) -> float:
    """Seconds of Python for one step of `rows` rows: a decode step, or a chunk of the prompt with the head.

    Args:
        batch_size: Rows of the head's product.
        moving: Layers that pass through slots.
    """
    layers = architecture.num_hidden_layers
    each = _layer_seconds(architecture, profile, rows)
    if prefill and profile.kv_format.is_quantized:
        each += _KV_WRITE
    beside = STEP_LAYERS * _PLAIN + _head(architecture, profile, batch_size)
    return host_share(machine) * (layers * each + beside + moving * _STREAMED)


def streamed_seconds(
    architecture: Architecture, profile: Profile, rows: int, machine: Machine, *, moving: int
) -> float:
    """Seconds of Python for the layers of a captured decode step that pass through slots, which are not captured."""
    return host_share(machine) * moving * (_layer_seconds(architecture, profile, rows) + _STREAMED)


def joined_seconds(profile: Profile, machine: Machine) -> float:
    """Seconds for a layer's attention over many earlier tokens, which is computed in parts."""
    return host_share(machine) * _JOINED[profile.kernels]


def kv_read_seconds(machine: Machine) -> float:
    """Seconds for dequantizing a layer's quantized cache."""
    return host_share(machine) * KV_READ


def _layer_seconds(architecture: Architecture, profile: Profile, rows: int) -> float:
    """Seconds of Python for one layer on the stated host."""
    few = by_few_rows(profile, profile.weights, rows)
    products = mean_of_layers(architecture, lambda layer: _products(layer, profile.weights, profile.tiles, rows, few))
    return _PLAIN + products + _attention(profile)


def _attention(profile: Profile) -> float:
    """Seconds of a layer's attention and cache more than those of fused attention over a preallocated cache."""
    seconds = 0.0
    if profile.attention in ("sdpa", "eager"):
        seconds += _SDPA
    if profile.cache == "dynamic":
        seconds += _DYNAMIC
    if profile.kv_device == "host":
        seconds += _HOST_KV
    return seconds


@lru_cache(maxsize=256)
def _products(layer: LayerSpec, weights: FormatName, tiles: bool, rows: int, few: bool) -> float:
    """Seconds of a layer's products more than those in 16 bits."""
    storage = FORMATS[weights]
    if few:
        return len(linear_shapes(layer)) * _FEW_ROWS
    if not storage.is_quantized_on_load:
        return 0.0
    seconds = 0.0
    for shape in linear_shapes(layer):
        if unpacks(storage, rows) or (storage.is_bnb_4bit and tiles and is_tiled(shape, rows)):
            seconds += -(-shape[0] // tile_rows(*shape)) * _TILES[storage.kernel]
        elif storage.has_outliers and tiles:
            seconds += -(-rows // int8_rows(*shape)) * _PRODUCTS[storage.kernel]
        else:
            seconds += _PRODUCTS[storage.kernel]
    return seconds


def _head(architecture: Architecture, profile: Profile, batch_size: int) -> float:
    """Seconds of the head, which multiplies one row of each sequence."""
    name = profile.head_format
    storage, (rows, columns) = FORMATS[name], architecture.head.shape
    if by_few_rows(profile, name, batch_size):
        return _FEW_ROWS
    tiles = -(-rows // tile_rows(rows, columns)) if unpacks(storage, batch_size) else 0
    return _PRODUCTS[storage.kernel] + tiles * _TILES.get(storage.kernel, 0.0)
