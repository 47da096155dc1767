"""Sessions: what a process needs that runs many workloads, each no larger than the planned one, in any order.

A shorter prompt, a smaller batch or a shorter answer can need more than the planned workload: torch's allocator
fragments by the sizes of tensors, and those depend on lengths. A few critical workloads are replayed, and a margin
covers the others. `tests/test_session.py` holds it against all lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.overhead import REPLAY_MISS, SEARCHED_TO
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.workload import Workload

# Two segments of torch's small pool: with some lengths it takes one more for keys, and one more for values.
_SMALL_SEGMENTS = 2 * 2 * 2**20
# The largest share of the peak that a fragment takes. Of 12,000 random smaller workloads of 640 random profiles,
# replayed on 2026-11-30, 2 needed more: both dequantize whole matrices for 70 sequences.
_FRAGMENT = 0.04


class Run(NamedTuple):
    """One workload in a fresh process, in bytes.

    Attributes:
        peak: The most that is allocated at once.
        roomy: What torch reserves without a limit.
        least: The least that it must be able to reserve.
    """

    peak: int
    roomy: int
    least: int


def critical_workloads(profile: Profile, workload: Workload) -> list[Workload]:
    """List the smaller workloads that can need more than `workload`; empty for a plain forward pass.

    These are a prompt of half the length with as long a context, and a batch without padding.
    """
    if workload.logits == "all":
        return []
    half = max(1, workload.prompt_len // 2)
    others = [
        replace(workload, prompt_len=half, max_new_tokens=workload.context_len - half),
        replace(workload, padded=False),
    ]
    return [one for one in dict.fromkeys(others) if one != workload]


def fragment_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Return the bytes that no tensor uses although torch has reserved them, because of an unlucky length.

    One result of `gate_proj` in a prefill step, (batch_size x chunk, intermediate_size), finds no free block of its
    size. A quantized cache makes all keys and values of a layer whole in every step, in two tensors that grow with the
    context: each leaves a block that the next one does not fit.
    """
    rows = workload.batch_size * min(profile.prefill_chunk_size or workload.prompt_len, workload.prompt_len)
    activation = rows * architecture.intermediate_size * profile.element_bytes
    if profile.kv_cache == "bf16":
        return activation
    tokens = workload.batch_size * workload.context_len
    return activation + SEARCHED_TO + 2 * tokens * architecture.key_value_width * profile.element_bytes


def least_of_session(runs: Iterable[Run], fragment: int) -> int:
    """Return the bytes that torch must be able to reserve for a session whose critical workloads are `runs`.

    At least what each of them needs, with the search's own step if it was searched; and the highest peak with the share
    that a replay can miss. On top of it there is one fragment, or 4 % of the peak if that is less.
    """
    every = list(runs)
    peak = max(run.peak for run in every)
    least = max(run.least + (SEARCHED_TO if run.least < run.roomy else 0) for run in every)
    left_over = min(fragment, int(peak * _FRAGMENT))
    return max(least, int((peak + SEARCHED_TO) * (1 + REPLAY_MISS))) + left_over + _SMALL_SEGMENTS
