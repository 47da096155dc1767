"""Checks of the KV cache and of the prefill."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vram.checkpoints.machine_file import current
from qwen_vram.diagnosis.costs import Subject
from qwen_vram.diagnosis.finding import Finding, of_bytes, of_ms
from qwen_vram.units import format_bytes

# Chunks of this length are proposed: activations are then a few percent of the weights for models of 7B.
_CHUNK = 1024
# Rate of copies from unpinned host memory, if it is not measured.
# measured: 7.2 to 7.7 GB/s, NVIDIA H200, torch 2.11.0+cu130, 2026-12-01.
UNPINNED_RATE = 7_400_000_000


def check_off(subject: Subject) -> Iterator[Finding]:
    """Find generation without a KV cache."""
    model, lengths = subject.model, subject.workload
    if model.generation.use_cache:
        return
    tokens = lengths.batch_size * (lengths.prompt_len + lengths.max_new_tokens // 2)
    products = tokens * sum(one.numel for one in model.matrices if one.role == "layer")
    chosen, experts = model.number("num_experts_per_tok"), model.number("num_experts", 1)
    products += tokens * sum(one.numel for one in model.matrices if one.role == "experts") * chosen // experts
    rate = model.product_rate or current().matmul_rate
    origin = "measured here" if model.product_rate else f"of {current().device}"
    yield of_ms(
        "cache-off",
        2 * products / rate * 1000,
        found="use_cache is false: each token computes the whole context again",
        cost=f"for each new token, {tokens:,} rows at the rate of products {origin}",
        fix="model.generation_config.use_cache = True, and model.config.use_cache = True",
    )


def check_oversized(subject: Subject) -> Iterator[Finding]:
    """Find a static cache that is longer than the workload."""
    model, lengths = subject.model, subject.workload
    longest = model.generation.longest_static
    if "static" not in model.generation.cache or longest <= lengths.context_len:
        return
    cost = (longest - lengths.context_len) * lengths.batch_size * model.kv_token_bytes
    if subject.matters(cost):
        yield of_bytes(
            "cache-oversized",
            cost,
            of=subject.own,
            found=f"an earlier call made a static cache of {longest:,} tokens, and later ones are never shorter",
            cost=f"more than for the {lengths.context_len:,} tokens of this workload",
            fix="del model._previous_max_cache_length after the long generation",
        )


def check_quantized(subject: Subject) -> Iterator[Finding]:
    """Find the quantized cache of `transformers`, which dequantizes a layer's whole cache in every step."""
    model = subject.model
    if model.generation.cache != "quantized":
        return
    cost = model.kv_token_bytes // max(1, model.layers - model.linear_layers)
    cost *= subject.workload.batch_size * subject.workload.context_len
    if subject.matters(cost):
        yield of_bytes(
            "cache-quantized",
            cost,
            of=subject.own,
            found='cache_implementation is "quantized": each step dequantizes the whole cache of a layer',
            cost="for the 16-bit copy of one layer's keys and values",
            fix='qv.load(model, kv_cache="int8"), which quantizes each token once',
        )


def check_offloaded(subject: Subject) -> Iterator[Finding]:
    """Find a cache in unpinned host memory."""
    model = subject.model
    if "offloaded" not in model.generation.cache or not model.on_gpu:
        return
    held = model.kv_token_bytes * subject.workload.batch_size * subject.workload.context_len
    rate = subject.machine.unpinned_rate or UNPINNED_RATE
    yield of_ms(
        "cache-offloaded",
        held / rate * 1000,
        found=f'cache_implementation is "{model.generation.cache}": {format_bytes(held)} in unpinned host memory',
        cost=f"for each token at {rate / 1e9:.1f} GB/s",
        fix='qv.load(model, kv_device="host") pins it and returns new tokens alone, or keep it on the GPU',
    )


def check_growing(subject: Subject) -> Iterator[Finding]:
    """Find a cache on a GPU that grows by concatenation."""
    model = subject.model
    if not model.on_gpu or model.generation.cache not in ("", "dynamic") or model.is_planned:
        return
    growing, fixed = subject.estimate(cache="dynamic"), subject.estimate(cache="preallocated")
    cost = growing.peak_reserved - fixed.peak_reserved
    if subject.is_worth(cost):
        yield of_bytes(
            "cache-growing",
            cost,
            of=subject.own,
            found="the cache grows by concatenation: each token copies each layer's keys and values",
            cost="of reserved memory more than with a cache that is allocated once",
            fix='qv.load(model, cache="preallocated"), or generate(..., cache_implementation="static")',
        )


def check_chunks(subject: Subject) -> Iterator[Finding]:
    """Find a long prompt that is processed at once."""
    model = subject.model
    if (
        model.is_planned
        or model.generation.chunk
        or subject.workload.prompt_len <= _CHUNK
        or not model.generation.use_cache
    ):
        return
    cost = subject.saved({"prefill_chunk_size": None}, {"prefill_chunk_size": _CHUNK})
    if subject.is_worth(cost):
        yield of_bytes(
            "prefill-whole",
            cost,
            of=subject.own,
            found=f"the prompt of {subject.workload.prompt_len:,} tokens is one forward pass",
            cost=f"of activations more than in chunks of {_CHUNK:,}",
            fix=f"model.generation_config.prefill_chunk_size = {_CHUNK}",
        )


CHECKS = (check_off, check_oversized, check_quantized, check_offloaded, check_growing, check_chunks)
