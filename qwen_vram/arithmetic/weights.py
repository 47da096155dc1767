"""Weights: the bytes of every parameter in the format it is stored in, and what of it lies on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from qwen_vram.arithmetic.architecture import Architecture, Weight
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.storage import ALLOCATION_STEP, FORMATS, FormatName

# One slot computes while the next fills.
STREAMING_SLOTS = 2


class StoredWeight(NamedTuple):
    """A weight with its storage format and exact bytes, quantization state included."""

    weight: Weight
    format: FormatName
    nbytes: int


class WeightBytes(NamedTuple):
    """Exact bytes of a model's weights.

    Attributes:
        device: On the device for good: resident layers, slots of the streaming ring, head, norms, embedding.
        host: On the host: streamed layers, the embedding where it lives there.
        rounding: What torch's allocator adds to `device` by rounding each tensor up to 512 bytes.
    """

    device: int
    host: int
    rounding: int


def format_of(weight: Weight, profile: Profile) -> FormatName:
    """The storage format of one weight: the head's, the matrices', or the model's own dtype."""
    if weight.role == "head":
        return profile.head_format
    return profile.weights if weight.is_linear else profile.dtype


def stored_weights(architecture: Architecture, profile: Profile) -> Iterator[StoredWeight]:
    """Every weight with its format and bytes; a tied head appears where it is quantized into a tensor of its own."""
    for weight in architecture.weights():
        name = format_of(weight, profile)
        yield StoredWeight(weight, name, FORMATS[name].nbytes(weight.shape))
    if _head_is_a_copy(architecture, profile):
        yield StoredWeight(architecture.head, profile.head_format, head_bytes(architecture, profile))


def head_bytes(architecture: Architecture, profile: Profile) -> int:
    """Bytes of the head's matrix in its format."""
    return FORMATS[profile.head_format].nbytes(architecture.head.shape)


def block_bytes(architecture: Architecture, profile: Profile) -> int:
    """Bytes of one decoder layer, quantization state included. Exact."""
    return sum(FORMATS[format_of(weight, profile)].nbytes(weight.shape) for weight in architecture.block)


@lru_cache(maxsize=256)
def weight_bytes(architecture: Architecture, profile: Profile) -> WeightBytes:
    """Where the model's weights lie and what they take. Exact to the byte; the rounding is torch's rule.

    Quantized biases do not exist: norms and biases stay in the model's own dtype.
    """
    block = block_allocated = 0
    for weight in architecture.block:
        storage = FORMATS[format_of(weight, profile)]
        block += storage.nbytes(weight.shape)
        block_allocated += storage.allocated(weight.shape)
    streamed = min(profile.streamed_layers, architecture.num_hidden_layers)
    on_device = architecture.num_hidden_layers - streamed + min(streamed, STREAMING_SLOTS)
    device, allocated, host = on_device * block, on_device * block_allocated, streamed * block
    for weight in architecture.outer:
        storage = FORMATS[format_of(weight, profile)]
        if weight.role == "embedding" and table_on_host(architecture, profile):
            host += storage.nbytes(weight.shape)
        else:
            device += storage.nbytes(weight.shape)
            allocated += storage.allocated(weight.shape)
    if _head_is_a_copy(architecture, profile):
        storage = FORMATS[profile.head_format]
        device += storage.nbytes(architecture.head.shape)
        allocated += storage.allocated(architecture.head.shape)
    return WeightBytes(device, host, allocated - device)


def table_on_host(architecture: Architecture, profile: Profile) -> bool:
    """Whether the token table leaves the device: not where a tied head needs it there."""
    shared_head = architecture.tie_word_embeddings and not _head_is_a_copy(architecture, profile)
    return profile.embeddings == "host" and not shared_head


def _head_is_a_copy(architecture: Architecture, profile: Profile) -> bool:
    return architecture.tie_word_embeddings and profile.head_format != profile.dtype


def largest_tensor_bytes(architecture: Architecture, profile: Profile) -> int:
    """The most that one weight takes in the model's own dtype: what is in flight while it is quantized on load."""
    shapes = [weight for weight in (*architecture.outer, *architecture.block) if weight.is_linear]
    quantized = [weight for weight in shapes if not FORMATS[format_of(weight, profile)].is_dense]
    largest = max((weight.numel for weight in quantized), default=0) * profile.element_bytes
    return -(-largest // ALLOCATION_STEP) * ALLOCATION_STEP
