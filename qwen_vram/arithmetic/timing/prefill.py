"""Predicted milliseconds from the prompt to the first token."""

from __future__ import annotations

from qwen_vram.arithmetic.attention import attention_parts
from qwen_vram.arithmetic.kv_cache import all_kv_bytes
from qwen_vram.arithmetic.timing.attention import chunk_of, prefill_attention_seconds, prefill_elementwise_seconds
from qwen_vram.arithmetic.timing.bytes_moved import disk_bytes, streams_in_prefill
from qwen_vram.arithmetic.timing.decode import LINK_SHARE
from qwen_vram.arithmetic.timing.few_rows import step_seconds
from qwen_vram.arithmetic.timing.host import host_prefill_seconds
from qwen_vram.arithmetic.timing.launches import joined_seconds, kv_read_seconds, launch_seconds
from qwen_vram.arithmetic.timing.linear import head_matrix, layer_matrices, product_seconds
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


def first_token_ms(
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    machine: Machine,
    *,
    on_cpu: bool = False,
) -> float:
    """Predict the milliseconds from the prompt to the first token.

    It is the longest of the times that overlap in each chunk. These are kernels on the GPU, their launches by Python,
    layers and a cache over the link, and layers from the disk. The head is added, for one row of each sequence.
    Arguments are as for `decode_ms`.
    """
    chunk = chunk_of(profile, workload)
    chunks = -(-workload.prompt_len // chunk)
    disk = chunks * disk_bytes(architecture, profile, workload) / machine.disk_read_rate
    if on_cpu:
        return 1000 * max(host_prefill_seconds(architecture, profile, workload, machine, chunks), disk)
    layers, batch = architecture.num_hidden_layers, workload.batch_size
    rows = workload.prompt_len * batch // chunks  # of the mean chunk
    layer = layer_matrices(architecture, profile)
    busy = chunks * layers * product_seconds(layer, rows, machine)
    busy += prefill_attention_seconds(architecture, profile, workload, machine)
    busy += prefill_elementwise_seconds(architecture, profile, workload, machine)
    moving = streams_in_prefill(architecture, profile)
    launching = chunks * launch_seconds(
        architecture, profile, rows, machine, batch_size=batch, moving=moving, prefill=True
    )
    past = workload.prompt_len - chunk
    if profile.kv_format.is_quantized:
        launching += (chunks - 1) * layers * kv_read_seconds(machine)
    if profile.attention == "fused" and attention_parts(chunk, past, padded=profile.kernels == "fused"):
        launching += chunks * layers * joined_seconds(profile, machine)
    crossing = chunks * moving * layer.nbytes
    if profile.kv_device == "host":
        crossing += chunks * all_kv_bytes(architecture, profile, tokens=(past + 1) // 2, batch_size=batch)
    link = crossing / (LINK_SHARE * machine.pinned_copy_rate)
    head = step_seconds(profile, profile.head_format, head_matrix(architecture, profile), batch, machine)
    return 1000 * (max(busy, launching, link, disk) + head)
