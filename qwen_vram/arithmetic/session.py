"""Memory of a session: generations within the planned lengths, in any order.

A shorter prompt, a smaller batch or a shorter answer can need more than the planned workload. The fragments of torch's
allocator depend on the sizes of tensors, and these depend on the lengths. A few critical workloads are replayed, and a
margin covers the others. `tests/arithmetic/test_session.py` compares it with all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from qwen_vram.arithmetic.batching import packed_tokens
from qwen_vram.arithmetic.process import REPLAY_MISS, SEARCHED_TO
from qwen_vram.arithmetic.tiling import int8_rows
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# Two segments of torch's small pool: with some lengths it takes one more for keys, and one more for values.
_SMALL_SEGMENTS = 2 * 2 * 2**20
# One segment of each of torch's two pools.
_GRAPH_SEGMENTS = 22 * 2**20
_FP32 = 4
_FP16 = 2
_INT64 = 8
# The buffer of torch's search for a column of outliers is larger than the block before it by at most this, 1.7 MiB.
# Recorded: NVIDIA H200, torch 2.11.0+cu130, bitsandbytes 0.50.2, 2026-11-26, pieces of more than 1,020 rows.
_COLUMN_SEARCH = 2 * 2**20
# The largest share of the peak that is counted for a fragment. Chosen by replay, so that
# tests/arithmetic/test_session.py passes for all of its profiles; 0.02 was too little for one of them, 2026-11-30.
_FRAGMENT = 0.04


class Run(NamedTuple):
    """One workload in a fresh process, in bytes.

    `peak` is the most that is allocated at once. Torch reserves `unlimited` without a limit, and must be able to
    reserve `least`.
    """

    peak: int
    unlimited: int
    least: int

    @property
    def counted(self) -> int:
        """The bytes that this workload needs, with the step of the search if they were searched."""
        return self.least + (SEARCHED_TO if self.least < self.unlimited else 0)


def critical_workloads(profile: Profile, workload: Workload) -> list[Workload]:
    """List the smaller workloads that can need more than `workload`; empty for a plain forward pass.

    These are a prompt of half the length with the same context, and a batch without padding.
    """
    if workload.logits == "all":
        return []
    half = max(1, workload.prompt_len // 2)
    others = [
        replace(workload, prompt_len=half, max_new_tokens=workload.context_len - half),
        replace(workload, padded=False),
    ]
    return [one for one in dict.fromkeys(others) if one != workload]


def smaller_step_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Return the bytes of a captured step of a smaller batch, which stays beside the planned one; otherwise 0.

    Its logits are in float32, and it has segments in the pool of CUDA graphs. The steps of a batch share both.
    """
    if profile.cache == "paged":
        return 0
    if not profile.captures or workload.batch_size == 1 or workload.logits == "all":
        return 0
    return (workload.batch_size - 1) * architecture.vocab_size * _FP32 + _GRAPH_SEGMENTS


def fragment_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Return the bytes that torch may have reserved in a session beyond what a single workload needs.

    One result of `gate_proj` in a prefill step, (batch_size x chunk, intermediate_size), finds no free block of its
    size. With a quantized cache, every step dequantizes all keys and values of a layer, into two tensors that grow with
    the context. Each leaves a block that the next one does not fit. There may be a captured step of a smaller batch.
    """
    widest = max(layer.inner_size for layer, _ in architecture.kinds)
    activation = _prefill_rows(profile, workload) * widest * profile.element_bytes
    activation += smaller_step_bytes(architecture, profile, workload)
    if not profile.kv_format.is_quantized:
        return activation
    tokens = workload.batch_size * workload.context_len
    width = max(layer.attention.key_value_width for layer, _ in architecture.kinds)
    return activation + SEARCHED_TO + 2 * tokens * width * profile.element_bytes


def _prefill_rows(profile: Profile, workload: Workload) -> int:
    """Rows of the largest prefill step."""
    if profile.cache == "paged":
        return packed_tokens(profile, workload)
    return workload.batch_size * min(profile.prefill_chunk_size or workload.prompt_len, workload.prompt_len)


def outlier_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Return the bytes that int8 matrices take because of the data; 0 for other formats.

    In tiled products, torch's search for outlier columns can need a larger buffer than the block that was just freed.
    It then also needs one segment for a piece of the input's rows. bitsandbytes' own products keep the number of each
    outlier column of every matrix, 8 bytes, at most for all columns.
    """
    if not FORMATS[profile.weights].has_outliers:
        return 0
    if not profile.tiles:
        columns = sum(matrix.shape[1] for layer in architecture.layers for matrix in layer.linears.values())
        return columns * _INT64
    matrices = [matrix for layer, _ in architecture.kinds for matrix in layer.linears.values()]
    rows = _prefill_rows(profile, workload)
    largest = max(min(rows, int8_rows(*weight.shape)) * weight.shape[1] * _FP16 for weight in matrices)
    return largest + _COLUMN_SEARCH


def session_least(architecture: Architecture, profile: Profile, workload: Workload, runs: Sequence[Run]) -> int:
    """Return the bytes that torch must be able to reserve for a session whose critical workloads are `runs`.

    They are at least the bytes that each run needs, with the step of the search if it was searched. They are also at
    least the highest peak with the share for the error of a replay. A margin is added.
    """
    peak = max(run.peak for run in runs)
    least = max(run.counted for run in runs)
    return max(least, with_miss(peak)) + margin_bytes(architecture, profile, workload, peak)


def with_miss(peak: int) -> int:
    """Return the bytes of a peak with the step of the search and the share for the error of a replay."""
    return int((peak + SEARCHED_TO) * (1 + REPLAY_MISS))


def margin_bytes(architecture: Architecture, profile: Profile, workload: Workload, peak: int) -> int:
    """Return the margin of a session: one fragment, or 4 % of the peak if that is less, and `outlier_bytes`."""
    left_over = min(fragment_bytes(architecture, profile, workload), int(peak * _FRAGMENT))
    return left_over + outlier_bytes(architecture, profile, workload) + _SMALL_SEGMENTS
