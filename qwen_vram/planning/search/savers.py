"""Savers that the planner may apply, least lossy first, with their cost."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from qwen_vram.arithmetic.batching import packed_tokens
from qwen_vram.checkpoints.resolve import stored_knobs
from qwen_vram.errors import WorkloadError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile, resolve_profile
from qwen_vram.spec.rules.table import ANYWHERE_RULES, Model
from qwen_vram.spec.workload import Workload

# The profile that the search begins with: lossless, without repeated keys and values, without a growing cache.
_LOSSLESS = Profile(name="auto", attention="fused", kernels="fused", cache="preallocated")


class Saver(NamedTuple):
    """One move of the search: the knobs that it sets, and its cost."""

    knobs: dict[str, object]
    cost: str


# Moves without a cost.
_FREE = (
    Saver({"prefill_chunk_size": 4096}, "nothing lost: the same tokens, fed in chunks"),
    Saver({"prefill_chunk_size": 2048}, "nothing lost: the same tokens, fed in chunks"),
    Saver({"prefill_chunk_size": 1024}, "nothing lost: the same tokens, slightly slower prefill"),
    Saver({"embeddings": "host"}, "nothing lost: rows are gathered on the host"),
    Saver({"prefill_chunk_size": 512}, "nothing lost: the same tokens, slower prefill"),
    Saver({"dequantization": "tiled"}, "nothing lost: matrices of bitsandbytes are dequantized tile by tile"),
)
# Keys and values in 8 bits, with captured steps: without them each step would dequantize the whole cache.
_NARROW: dict[str, object] = {"kv_cache": "int8", "captured": True}
_OF_NARROW = "8-bit keys and values but for the newest 128 tokens: the smallest loss"
# Moves that cost precision, least lossy first by the mean KL divergence from 16 bits. It is 0.0006 for keys and values
# in int8, 0.0018 for int8-wo and 0.072 for nf4. Keys and values in int4 have 0.0022, but over 512 tokens only.
# measured: Qwen2.5-Coder-0.5B-Instruct, CPU, 2026-12-01, benchmarks/results/quality.jsonl (docs/quality.md).
_PRECISION = (
    # Its products take a tenth of the time of bitsandbytes' int8 on a GPU, and less than bf16's on a CPU. It is closer
    # to bf16. measured: benchmarks/results/real_formats.jsonl, cpu_products.jsonl.
    Saver({"weights": "int8-wo"}, "8-bit weights: close to lossless"),
    Saver({"weights": "nf4", "dequantization": "tiled"}, "4-bit weights"),
    Saver({"weights": "nf4", "lm_head": "nf4"}, "4-bit head"),
    # A tied head in 4 bits is a copy, which saves memory only if the token embeddings are on the host.
    Saver({"weights": "nf4", "lm_head": "nf4", "embeddings": "host"}, "4-bit head, rows are gathered on the host"),
)
# Moves that also cost time.
_SLOW = (
    Saver({"kv_cache": "int8"}, "8-bit keys and values but for the newest 128 tokens"),
    Saver({"kv_cache": "int4"}, "4-bit keys and values but for the newest 128 tokens"),
    Saver({"kv_cache": "bf16", "kv_device": "host"}, "whole keys and values, brought over the link for every token"),
)


def _moves(start: Profile, knobs: dict[str, object], layers: int) -> tuple[Saver, ...]:
    """Return all moves in order. Each builds on those before it.

    Weights of each precision have the cache of the start first, and then that of `_NARROW`.
    """
    own = {name: getattr(start, name) for name in _NARROW if name not in knobs}
    stream = Saver({"streamed_layers": layers}, "layers cross the link for every token")
    captured = {name: own[name] for name in own if name == "captured"}
    both = (
        (move._replace(knobs={**own, **move.knobs}), Saver({**move.knobs, **_NARROW}, _OF_NARROW))
        for move in _PRECISION
    )
    return (
        *_FREE,
        Saver(_NARROW, _OF_NARROW),
        *(move for pair in both for move in pair),
        *(move._replace(knobs={**captured, **move.knobs}) for move in (*_SLOW, stream)),
    )


def search_space(
    architecture: Architecture, profile: str | Profile, workload: Workload, knobs: dict[str, object]
) -> tuple[Profile, tuple[Saver, ...]]:
    """Return the profile to start from, and the moves that change only knobs that caller and checkpoint left open."""
    knobs = stored_knobs(architecture, knobs)
    if profile != "auto":
        return resolve_profile(profile, **knobs), ()
    start = replace(_LOSSLESS.replace(**knobs), name="auto")
    every = _moves(start, knobs, architecture.num_hidden_layers)
    moves = [move for move in every if _is_open(move, start, architecture, workload, knobs)]
    if architecture.adapter_activated:  # such an adapter needs the whole prompt at once
        moves = [move for move in moves if "prefill_chunk_size" not in move.knobs]
    return start, tuple(moves)


def _is_open(
    move: Saver, start: Profile, architecture: Architecture, workload: Workload, knobs: dict[str, object]
) -> bool:
    """Tell if a move keeps the caller's knobs, and can save: a chunk that is longer than the prompt cannot."""
    if any(knobs.get(knob, value) != value for knob, value in move.knobs.items()):
        return False
    try:
        moved = Model(architecture, start.replace(**move.knobs))
    except WorkloadError:  # a rule of the profile
        return False
    if any(rule.knob in move.knobs and rule.when(moved) for rule in ANYWHERE_RULES):
        return False
    chunk = move.knobs.get("prefill_chunk_size")
    longest = packed_tokens(start, workload) if start.cache == "paged" else workload.prompt_len
    return not isinstance(chunk, int) or chunk < longest


def change_of(before: Profile, candidate: Profile, move: Saver | None) -> str:
    """The changes of `move` in words; for the starting profile (`None`), its weights, attention and cache."""
    if move is None:
        return f"{candidate.weights} weights, {candidate.attention} attention, {candidate.cache} cache"
    turned = {knob: value for knob, value in move.knobs.items() if getattr(before, knob) != value}
    return ", ".join(f"{knob}={value!r}" for knob, value in turned.items())


def cost_of(candidate: Profile, move: Saver | None) -> str:
    """The cost of `move` in words; for the starting profile (`None`), that of its weights."""
    if move is None:
        return "nothing lost" if FORMATS[candidate.weights].is_dense else f"{candidate.weights} weights"
    return move.cost
