"""Bytes of the weights in their storage formats, and of their part on the device."""

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from qwen_vram.dtypes import BF16
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import BLOCK, FORMATS, FormatName
from qwen_vram.spec.layers import LayerSpec, Weight
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency

if TYPE_CHECKING:
    from qwen_vram.spec.prequantized import Stored

# Layers below this cross the link faster than one token follows another. 28 NF4 layers of Qwen2.5-7B (120 MB) took
# 65.8 ms a token with two slots and 64.2 with three, and the link needs 61.1. 28 layers in bf16 (466 MB) keep the link
# busy at 98 % with two.
# measured: NVIDIA H100, driver 580, torch 2.11.0+cu130, 2026-11-25.
_QUICK_BLOCK = 2**28

# Tensors of a disk layer below this stay in host memory, because each would be a separate request to the disk. They are
# norms, biases, tables and the scales of scales, 0.1 % of a layer of Qwen2.5-7B.
SMALLEST_READ = 2**16
# Buffers in host memory that disk layers pass through: one is copied to the device while the next is read.
_DISK_BUFFERS = 2


class StoredWeight(NamedTuple):
    """A weight with its storage format and exact bytes, with quantization state."""

    weight: Weight
    format: FormatName
    nbytes: int


class WeightBytes(NamedTuple):
    """Exact bytes of a model's weights.

    Attributes:
        device: Bytes that stay on the device: resident layers, slots of streamed layers, head, norms, embedding,
            adapter.
        host: Bytes on the host: streamed layers, copies of those that compute there, buffers of disk layers, and the
            token embeddings if they are on the host.
        disk: Bytes of disk layers that are read from the checkpoint's files.
    """

    device: int
    host: int
    disk: int


def format_of(weight: Weight, profile: Profile) -> FormatName:
    """The storage format of one weight: the head's, the matrices', or the model's own dtype."""
    if weight.role == "head":
        return profile.head_format
    return profile.weights if weight.is_linear else profile.dtype


def stored_weights(architecture: Architecture, profile: Profile) -> Iterator[StoredWeight]:
    """Yield every weight with its format and bytes, also a tied head if it is quantized into a separate tensor."""
    stored = architecture.stored
    for weight in architecture.weights():
        name = format_of(weight, profile)
        nbytes = stored.matrix(weight.name) if stored else FORMATS[name].nbytes(weight.shape)
        yield StoredWeight(weight, name, nbytes)
    for weight in architecture.adapter_weights:
        yield StoredWeight(weight, profile.dtype, weight.numel * profile.element_bytes)
    if architecture.has_head and residency(architecture, profile).own_head:
        yield StoredWeight(architecture.head, profile.head_format, head_bytes(architecture, profile))


def head_bytes(architecture: Architecture, profile: Profile) -> int:
    """Bytes of the head's matrix in its format, or in the checkpoint if its headers were read."""
    if architecture.stored and architecture.stored.head:
        return architecture.stored.head_bytes
    return FORMATS[profile.head_format].nbytes(architecture.head.shape)


@lru_cache(maxsize=256)
def block_bytes(architecture: Architecture, profile: Profile) -> int:
    """Bytes of one decoder layer, with quantization state; of the largest one if layers differ. Exact."""
    if architecture.stored:
        return architecture.stored.largest_layer
    return max(sum(_layer_parts(layer, profile)) for layer, _ in architecture.kinds)


@lru_cache(maxsize=256)
def slot_bytes(architecture: Architecture, profile: Profile) -> int:
    """Bytes of one slot that streamed layers pass through: those of the largest of them. Exact."""
    if architecture.stored:
        return block_bytes(architecture, profile)
    sizes = _layer_bytes(architecture, profile)
    return max((sizes[number] for number in residency(architecture, profile).streamed), default=0)


def _layer_bytes(architecture: Architecture, profile: Profile, *, below: int | None = None) -> list[int]:
    """Bytes of each decoder layer, or of its tensors below `below` bytes."""
    sizes = {
        layer: sum(part for part in _layer_parts(layer, profile) if below is None or part < below)
        for layer, _ in architecture.kinds
    }
    return [sizes[layer] for layer in architecture.layers]


def streaming_slots(architecture: Architecture, profile: Profile) -> int:
    """Slots that streamed layers pass through: one computes while the next is filled.

    A third one keeps the link busy between tokens if every layer is streamed, so that no resident layer gives it time,
    and layers are small.
    """
    homes = residency(architecture, profile)
    pause = not homes.resident and block_bytes(architecture, profile) < _QUICK_BLOCK
    return min(len(homes.streamed), 3 if pause else 2)


def disk_buffers(profile: Profile) -> int:
    """Buffers in host memory that disk layers pass through; if all of these layers fit, they are read once."""
    return min(profile.disk_layers, _DISK_BUFFERS)


def computing_copies(architecture: Architecture, profile: Profile) -> int:
    """Bytes of the copies for layers that compute on the CPU: 4-bit matrices in the layout of its kernel.

    Their block maxima are bf16 there. Exact.
    """
    if not FORMATS[profile.weights].is_bnb_4bit:
        return 0
    computing = residency(architecture, profile).computing
    counts = (architecture.layers[number].linear_numel for number in computing)
    return sum(count // 2 + count // BLOCK * BF16.nbytes for count in counts)


@lru_cache(maxsize=256)
def weight_bytes(architecture: Architecture, profile: Profile) -> WeightBytes:
    """The bytes of the model's weights on the device, on the host and on the disk. Exact.

    Norms and biases are not quantized: they stay in the model's own dtype. A checkpoint whose headers were read is
    counted as it is stored.
    """
    if architecture.stored:
        return _stored_bytes(architecture, architecture.stored, profile)
    homes, sizes = residency(architecture, profile), _layer_bytes(architecture, profile)
    small = _layer_bytes(architecture, profile, below=SMALLEST_READ)
    device = sum(nbytes for nbytes, home in zip(sizes, homes.layers, strict=True) if home == "device")
    device += streaming_slots(architecture, profile) * slot_bytes(architecture, profile)
    host = sum(sizes[number] for number in homes.streamed - homes.disk) + sum(small[number] for number in homes.disk)
    host += disk_buffers(profile) * max((sizes[number] for number in homes.disk), default=0)
    host += computing_copies(architecture, profile)
    for weight in architecture.outer:
        storage = FORMATS[format_of(weight, profile)]
        if weight.role == "embedding" and homes.table_on_host:
            host += storage.nbytes(weight.shape)
        else:
            device += storage.nbytes(weight.shape)
    if architecture.has_head and homes.own_head:
        device += head_bytes(architecture, profile)
    read = sum(sizes[number] - small[number] for number in homes.disk)
    return WeightBytes(device + _adapter_bytes(architecture, profile), host, read)


def _layer_parts(layer: LayerSpec, profile: Profile) -> Iterator[int]:
    """Yield the bytes of every tensor of a decoder layer, with quantization state."""
    for weight in layer.weights:
        yield from FORMATS[format_of(weight, profile)].part_sizes(weight.shape)


def _stored_bytes(architecture: Architecture, stored: "Stored", profile: Profile) -> WeightBytes:
    """`weight_bytes` of a checkpoint whose headers give each tensor's bytes."""
    from qwen_vram.spec.prequantized import size  # only for a quantized checkpoint

    homes = residency(architecture, profile)
    streamed, in_files = len(homes.streamed), len(homes.disk)
    layers = stored.on_device(streamed, streaming_slots(architecture, profile))
    device = sum(map(size, layers)) + size(stored.norm) + size(stored.head)
    passing = disk_buffers(profile) * block_bytes(architecture, profile)
    small, disk = stored.on_disk(in_files, SMALLEST_READ)
    host, table = stored.on_host(streamed - in_files) + passing + small, size(stored.embedding)
    host += computing_copies(architecture, profile)
    if homes.table_on_host:
        host += table
    else:
        device += table
    return WeightBytes(device + _adapter_bytes(architecture, profile), host, disk)


def _adapter_bytes(architecture: Architecture, profile: Profile) -> int:
    return sum(weight.numel for weight in architecture.adapter_weights) * profile.element_bytes
