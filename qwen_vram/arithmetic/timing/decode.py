"""Predicted milliseconds of a decode step in the middle of the answer."""

from __future__ import annotations

from qwen_vram.arithmetic.kv_cache import all_kv_bytes
from qwen_vram.arithmetic.timing.attention import decode_attention_seconds, decode_nodes_seconds
from qwen_vram.arithmetic.timing.bytes_moved import computing_layers, disk_bytes, moving_layers, product_rate
from qwen_vram.arithmetic.timing.few_rows import step_seconds
from qwen_vram.arithmetic.timing.host import host_decode_seconds
from qwen_vram.arithmetic.timing.launches import kv_read_seconds, launch_seconds, streamed_seconds
from qwen_vram.arithmetic.timing.linear import head_matrix, layer_matrices
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import residency
from qwen_vram.spec.workload import Workload

# Share of the rate of pinned copies at which layers and caches are copied: tokens took 64.2 and 249 ms, and the link
# needs 61.1 and 239.
# measured: NVIDIA H100, 2026-11-25, benchmarks/results/streaming_speed.jsonl, streaming_host.jsonl.
LINK_SHARE = 0.96
# Seconds of a captured step for its row of token embeddings on the host: the host waits for the token, gathers, and
# copies. 7B in NF4 took 3.35 ms a token, and 3.25 with the embeddings on the GPU.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-30, benchmarks/results/default_plans.jsonl (6 and 8 GiB).
_TABLE_ROW = 0.1e-3


def decode_ms(
    architecture: Architecture,
    profile: Profile,
    workload: Workload,
    machine: Machine,
    *,
    on_cpu: bool = False,
) -> float:
    """Predict the milliseconds of one decode step in the middle of the answer.

    It is the longest of the times that overlap. These are kernels on the GPU, their launches by Python unless steps are
    captured, bytes over the link, and bytes from the disk. Layers that compute on the CPU run before or after those on
    the GPU. They read their bytes from host memory, as the link does.

    Args:
        machine: The machine whose rates are used.
        on_cpu: Everything runs on the host.
    """
    tokens = workload.prompt_len + workload.max_new_tokens // 2
    if profile.attends_whole:
        tokens = workload.context_len
    disk = disk_bytes(architecture, profile, workload) / machine.disk_read_rate
    if on_cpu:
        return 1000 * max(host_decode_seconds(architecture, profile, workload, machine, tokens), disk)
    batch = workload.batch_size
    layer = layer_matrices(architecture, profile)
    computing = computing_layers(architecture, profile, workload)
    moving = moving_layers(architecture, profile, workload)
    resident = architecture.num_hidden_layers - computing
    busy = resident * step_seconds(profile, profile.weights, layer, batch, machine)
    busy += step_seconds(profile, profile.head_format, head_matrix(architecture, profile), batch, machine)
    busy += decode_attention_seconds(architecture, profile, machine, tokens, batch)
    busy += decode_nodes_seconds(architecture, profile, machine)
    host = computing * layer.nbytes / (product_rate(profile, machine) or machine.pinned_copy_rate)
    crossing = moving * layer.nbytes
    if profile.kv_device == "host":
        crossing += all_kv_bytes(architecture, profile, tokens=tokens, batch_size=batch)
    link = crossing / (LINK_SHARE * machine.pinned_copy_rate)
    if profile.captures:
        busy += _TABLE_ROW if residency(architecture, profile).table_on_host else 0.0
        launching = streamed_seconds(architecture, profile, batch, machine, moving=moving)
    else:
        launching = launch_seconds(
            architecture, profile, batch, machine, batch_size=batch, moving=moving, prefill=False
        )
        if profile.kv_format.is_quantized:
            launching += architecture.num_hidden_layers * kv_read_seconds(machine)
    memory = 0.0
    if host and machine.host_product_rate:
        memory = (computing * layer.nbytes + crossing) / machine.host_product_rate
    return 1000 * max(launching + host, busy + host, link, disk, memory)
