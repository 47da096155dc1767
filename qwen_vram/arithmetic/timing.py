"""Timing: the floor under milliseconds per token, bytes that must move over the rate at which they can."""

from __future__ import annotations

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.kv_cache import layer_kv_bytes
from qwen_vram.arithmetic.machine import Machine
from qwen_vram.arithmetic.machine_file import current
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.weights import block_bytes, disk_buffers, head_bytes, weight_bytes
from qwen_vram.arithmetic.workload import Workload


def decode_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Bytes read from device memory for one decode step at the end of the workload: weights once, the cache once.

    The embedding is not read, only one row of it.
    """
    blocks = architecture.num_hidden_layers * block_bytes(architecture, profile)
    head = head_bytes(architecture, profile)
    cache = architecture.num_hidden_layers * layer_kv_bytes(
        architecture, profile, tokens=workload.context_len, batch_size=workload.batch_size
    )
    return blocks + head + cache


def link_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Bytes that cross from host to device for one decode step: streamed layers, and the cache where it lives there."""
    streamed = min(profile.streamed_layers, architecture.num_hidden_layers) * block_bytes(architecture, profile)
    if profile.kv_device == "device":
        return streamed
    layer = layer_kv_bytes(architecture, profile, tokens=workload.context_len, batch_size=workload.batch_size)
    return streamed + architecture.num_hidden_layers * layer


def disk_bytes(architecture: Architecture, profile: Profile) -> int:
    """Bytes that are read from the checkpoint's files for one decode step; none where the buffers hold all of them."""
    stays = profile.disk_layers <= disk_buffers(profile)
    return 0 if stays else weight_bytes(architecture, profile).disk


def decode_floor_ms(
    architecture: Architecture, profile: Profile, workload: Workload, machine: Machine | None = None
) -> float:
    """The least milliseconds that one decode step can take: a floor, not an estimate.

    The largest of bytes over device bandwidth, bytes over the link and bytes over the disk's rate, which can overlap.
    What the system's page cache still holds of the disk's bytes comes faster. `machine` has the rates; `None` is the
    one measured last, or the stated default.
    """
    machine = machine or current()
    device = decode_bytes(architecture, profile, workload) / machine.device_bandwidth
    link = link_bytes(architecture, profile, workload) / machine.pinned_copy_rate
    disk = disk_bytes(architecture, profile) / machine.disk_read_rate
    return 1000 * max(device, link, disk)
