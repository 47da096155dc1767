"""Times of attention and of element-by-element kernels on a GPU."""

from __future__ import annotations

from qwen_vram.arithmetic.attention import attention_parts
from qwen_vram.arithmetic.kv_cache import layer_kv_bytes
from qwen_vram.arithmetic.timing.linear import mean_of_layers
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import LayerSpec
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# A layer's attention of one new token over 512: 10.4 us in 24 layers of 0.5B and in 28 of 7B.
# measured: NVIDIA H200 and H100, torch 2.11.0+cu130, 2026-11-26, benchmarks/results/decode.jsonl.
_DECODE_START = 10.4e-6
# The same in a captured step with fused kernels, where it includes the rotation and the writing into the cache. It
# reads keys and values at this share of a copy's rate: 5.8 us over 600 keys of 7B, 8.1 over 2,304, 29 over 32,000.
# measured: NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-12-01, benchmarks/results/decode_attention.jsonl.
_CAPTURED_START, _CAPTURED_SHARE = 5.6e-6, 0.65
# The same over codes in 8 or 4 bits. Each element takes the time in which a copy moves this number of bytes. For 7B it
# is 8.4 us over 600 keys, 14 over 2,304, and 67 to 71 over 32,000. Over 2,000 keys of 8 sequences each it is 38 to 40.
# measured: as above, with at most 64 parts. The loop is not limited by bytes, so more parts may be faster.
_CODES_START, _CODES_BYTES = 8e-6, 7.6
# Share of a copy's rate at which keys and values are read, and at which small kernels move bytes.
_READ_SHARE = 0.8
# Small kernels of a layer: plain 24, 1.47 ms of them in 28 layers at 2.2 us each; fused ones by the code; compiled 7,
# 0.43 ms. A step has about ten beside its layers, and samples a token. measured: as above.
_NODES = {"plain": 24, "fused": 9}
_COMPILED_NODES = 7
# Small kernels of a layer in a captured step with fused kernels, without products and attention: two norms.
# Source: runtime/decoding/layer.py.
_CAPTURED_NODES = 2
_STEP_NODES = 10
_STEP_SECONDS = 0.15e-3
# Operations a second as shares of `matmul_rate`. cuDNN over earlier keys without a mask has 694 TFLOP/s with 4,096
# rows, cuDNN with a causal mask from the start 512, and flash 317. sdpa with a mask also computes the masked scores.
# measured: NVIDIA H100, torch 2.11.0+cu130, 2026-11-26, benchmarks/results/attention_parts.jsonl; sdpa: H200,
# 2026-11-26, caps_chunks.jsonl.
_JOINED, _CAUSAL, _FLASH, _MASKED = 1.05, 0.82, 0.5, 0.48
# Elements that sdpa with a mask moves for each element of the keys, repeated for all query heads: it copies them for
# each chunk.
# measured: 32,000 tokens in chunks of 512 to 4,096, H200, 2026-11-26, caps_chunks.jsonl.
_COPIED = 14
# Seconds of a chunk after many tokens that are not in proportion to its tokens; the reason is not known.
# measured: chunks of 2,048 and of 4,096, the same rows.
_CHUNK = 10e-3
# The number of times that an element of a token is read or written in a layer: of the hidden states, and of the MLP's.
_MOVED = {"plain": (32, 4), "fused": (16, 3)}


def decode_attention_seconds(
    architecture: Architecture, profile: Profile, machine: Machine, tokens: int, batch_size: int
) -> float:
    """Seconds of attention over `tokens` tokens of each sequence in all layers, for one new token."""

    def one(layer: LayerSpec) -> float:
        held = layer_kv_bytes(layer, profile, tokens=tokens, batch_size=batch_size)
        by_own_kernel = profile.captured and profile.kernels == "fused"
        if profile.kv_format.is_quantized and not by_own_kernel:  # dequantized: written, and read
            held += 4 * layer.attention.key_value_width * tokens * batch_size * profile.element_bytes
        if by_own_kernel and profile.kv_format.is_quantized:
            elements = 2 * layer.attention.key_value_width * tokens * batch_size
            return _CODES_START + elements * _CODES_BYTES / machine.device_bandwidth
        if by_own_kernel:
            return _CAPTURED_START + held / (_CAPTURED_SHARE * machine.device_bandwidth)
        return _DECODE_START + held / (_READ_SHARE * machine.device_bandwidth)

    return architecture.num_hidden_layers * mean_of_layers(architecture, one)


def decode_nodes_seconds(architecture: Architecture, profile: Profile, machine: Machine) -> float:
    """Seconds of a decode step's small kernels, and of sampling the token."""
    each = _COMPILED_NODES if profile.compiled else _NODES[profile.kernels]
    if profile.captured and profile.kernels == "fused":
        each = _CAPTURED_NODES
    nodes = architecture.num_hidden_layers * each + _STEP_NODES
    return nodes * machine.graph_node_time / 1e9 + _STEP_SECONDS


def prefill_attention_seconds(
    architecture: Architecture, profile: Profile, workload: Workload, machine: Machine
) -> float:
    """Seconds of attention of the whole prompt in all layers."""
    prompt, chunk = workload.prompt_len, chunk_of(profile, workload)
    past = prompt - chunk
    width = sum(layer.attention.width for layer in architecture.layers)
    element = 4 * width * workload.batch_size
    newest = element * prompt * chunk / 2  # causal
    older = element * prompt * past / 2
    if profile.attention in ("sdpa", "eager") or workload.padded:
        if not past and not workload.padded and profile.attention == "sdpa":
            return newest / (_CAUSAL * machine.matmul_rate)
        # Keys and values are copied for every query head, written and read, for each chunk.
        copies = _COPIED * width * profile.element_bytes
        copied = copies * workload.batch_size * (prompt / chunk) * (prompt + chunk) / 2
        return (2 * newest + older) / (_MASKED * machine.matmul_rate) + copied / (
            _READ_SHARE * machine.device_bandwidth
        )
    joined = attention_parts(chunk, past, padded=profile.kernels == "fused")
    seconds = (newest / _CAUSAL + older / (_JOINED if joined else _FLASH)) / machine.matmul_rate
    return seconds + past / chunk * _CHUNK if joined else seconds


def chunk_attention_seconds(
    architecture: Architecture, profile: Profile, machine: Machine, *, tokens: int, past: int
) -> float:
    """Seconds of attention of one chunk of `tokens` tokens after `past` tokens of its sequence, in all layers.

    The sum over the chunks of a prompt is `prefill_attention_seconds` of fused attention that is not joined from parts.
    """
    width = sum(count * layer.attention.width for layer, count in architecture.kinds)
    newest = 2 * width * tokens * tokens  # causal
    older = 4 * width * tokens * past
    return (newest / _CAUSAL + older / _FLASH) / machine.matmul_rate


def prefill_elementwise_seconds(
    architecture: Architecture, profile: Profile, workload: Workload, machine: Machine
) -> float:
    """Seconds of the elementwise kernels of the whole prompt in all layers."""
    hidden, inner = _MOVED[profile.kernels]
    elements = sum(hidden * architecture.hidden_size + inner * layer.inner_size for layer in architecture.layers)
    moved = elements * profile.element_bytes * workload.prompt_len * workload.batch_size
    return moved / (_READ_SHARE * machine.device_bandwidth)


def chunk_of(profile: Profile, workload: Workload) -> int:
    """Tokens of a sequence in one chunk of the prompt."""
    return min(profile.prefill_chunk_size or workload.prompt_len, workload.prompt_len)
