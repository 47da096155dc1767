"""Lower bound of milliseconds per token: the bytes that must move, over their rate."""

from __future__ import annotations

from qwen_vram.arithmetic.kv_cache import all_kv_bytes
from qwen_vram.arithmetic.weights import block_bytes, disk_buffers, head_bytes, streaming_slots, weight_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency
from qwen_vram.spec.workload import Workload

# Rows up to which layers compute on the CPU: with more rows, memory is not the only limit of a product. Four rows take
# 0.97 (bf16) and 1.27 times (nf4) as long as one, eight 1.12 and 2.26 times.
# measured: AMD EPYC, 2 cores, torch 2.13.0, bitsandbytes 0.50.2, a matrix of 18,944 x 3,584, 2026-11-25.
HOST_ROWS = 4
# Bytes of 16-bit weights a second that a CPU multiplies with one row, for a machine that was not measured.
# measured: AMD EPYC, 2 cores, torch 2.13.0, 2026-11-30, tools.product_rates, the fastest of eight processes.
HOST_PRODUCT_RATE = 11_800_000_000


def decode_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Bytes read from device memory by the last decode step of the workload: weights once, the cache once.

    Of the token embeddings only one row is read, which is not counted; nor are layers that compute on the CPU.
    """
    layers = architecture.num_hidden_layers - computing_layers(architecture, profile, workload)
    blocks = layers * block_bytes(architecture, profile)
    head = head_bytes(architecture, profile)
    cache = all_kv_bytes(architecture, profile, tokens=workload.context_len, batch_size=workload.batch_size)
    return blocks + head + cache


def computing_layers(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Layers that compute on the CPU in this workload's decode steps."""
    few = workload.batch_size <= HOST_ROWS
    return len(residency(architecture, profile).computing) if few else 0


def product_rate(profile: Profile, machine: Machine) -> int | None:
    """Bytes of weights a second that the CPU multiplies with one row; `None` if it was not measured."""
    return machine.host_4bit_rate if FORMATS[profile.weights].is_bnb_4bit else machine.host_product_rate


def link_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Bytes copied from host to device for one decode step: streamed layers, and the cache if it is on the host."""
    streamed = moving_layers(architecture, profile, workload) * block_bytes(architecture, profile)
    if profile.kv_device == "device":
        return streamed
    return streamed + all_kv_bytes(architecture, profile, tokens=workload.context_len, batch_size=workload.batch_size)


def moving_layers(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Layers that pass through the slots in a decode step; 0 if the slots hold all of them."""
    layers = len(residency(architecture, profile).streamed)
    layers -= computing_layers(architecture, profile, workload)
    return layers if layers > streaming_slots(architecture, profile) else 0


def streams_in_prefill(architecture: Architecture, profile: Profile) -> int:
    """Layers that pass through the slots in each chunk of a prefill, in which none computes on the CPU."""
    layers = len(residency(architecture, profile).streamed)
    return layers if layers > streaming_slots(architecture, profile) else 0


def disk_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Bytes that are read from the checkpoint's files for one decode step; 0 if the buffers hold all of them."""
    stays = profile.disk_layers <= disk_buffers(profile) or not moving_layers(architecture, profile, workload)
    return 0 if stays else weight_bytes(architecture, profile).disk


def decode_floor_ms(
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    machine: Machine,
    *,
    on_cpu: bool = False,
) -> float:
    """The least milliseconds that one decode step can take: a lower bound, not an estimate.

    It is the largest of three times that can overlap: bytes over the rates of the device, of the link and of the disk.
    The disk's bytes are read faster if they are still in the page cache. `machine` has the rates. Layers that compute
    on the CPU run before or after those on the device. If their rate was not measured, they take the time of the link.
    With `on_cpu` the bytes are read from host memory.
    """
    disk = disk_bytes(architecture, profile, workload) / machine.disk_read_rate
    if on_cpu:
        return 1000 * max(decode_bytes(architecture, profile, workload) / host_read_rate(machine), disk)
    device = decode_bytes(architecture, profile, workload) / machine.device_bandwidth
    link = link_bytes(architecture, profile, workload) / machine.pinned_copy_rate
    return 1000 * max(device + _products(architecture, profile, workload, machine), link, disk)


def host_read_rate(machine: Machine) -> int:
    """Bytes a second at which the CPU can read weights: the fastest of its products, measured or stated."""
    measured = [rate for rate in (machine.host_product_rate, machine.host_4bit_rate) if rate is not None]
    return max(measured, default=HOST_PRODUCT_RATE)


def _products(architecture: Architecture, profile: Profile, workload: Workload, machine: Machine) -> float:
    """Seconds of the CPU's products."""
    nbytes = computing_layers(architecture, profile, workload) * block_bytes(architecture, profile)
    return nbytes / (product_rate(profile, machine) or machine.pinned_copy_rate)
