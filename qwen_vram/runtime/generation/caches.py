"""KV caches of a plan: the cache that `new_cache()` returns, and that of one generation."""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache, StaticCache

from qwen_vram.arithmetic.gpu_split import split_of
from qwen_vram.errors import WorkloadError
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.decoding.graph_cache import GraphCache
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.kv_cache.host import HostCache
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache
from qwen_vram.spec.workload import Workload


def new_cache(plan: Plan, decoder: Decoder | None, *, max_length: int) -> Cache:
    """Return a cache of `max_length` tokens, which takes its memory with its first tokens.

    Raises:
        WorkloadError: `max_length` is not a positive number.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise WorkloadError(
            f"max_length must be a positive whole number of tokens, got {max_length!r}",
            name="max_length",
            got=max_length,
        )
    if decoder is not None:
        return GraphCache(decoder, num_hidden_layers=decoder.layers, max_length=max_length)
    profile, architecture = plan.profile, plan.estimate.architecture
    assert architecture is not None
    layers, split = architecture.num_hidden_layers, tuple(split_of(plan.estimate).values())
    if profile.kv_device == "host":
        return HostCache(layers, max_length=max_length, split=split)
    return PreallocatedCache(layers, max_length=max_length, kv_cache=profile.kv_cache, split=split)


def cache_settings(
    plan: Plan, decoder: Decoder | None, model: Any, workload: Workload, length: int, *, kept: bool
) -> dict[str, Any]:
    """Return the plan's cache as options of `generate`; a preallocated cache holds `length` tokens.

    Args:
        kept: A conversation keeps the cache, so that a static one and that of captured steps hold `length` tokens too.
    """
    most = length if kept else workload.context_len
    if decoder is not None:
        decoder.prepare(workload.batch_size, most)
        return {"past_key_values": new_cache(plan, decoder, max_length=most)}
    if plan.profile.cache == "preallocated":
        return {"past_key_values": new_cache(plan, decoder, max_length=length)}
    if plan.profile.cache == "static":
        # `generate` would keep a static cache that it creates, and would compile for it unless told otherwise.
        return {"past_key_values": StaticCache(config=model.config, max_cache_len=most), "disable_compile": True}
    return {"past_key_values": DynamicCache(config=model.config)} if kept else {"cache_implementation": "dynamic"}
