"""Process memory beside torch's tensors: CUDA context, kernels and libraries.

`workspace` is part of torch's allocated bytes. The allocator's fragments are part of its reserved bytes only. The CUDA
context with its kernels is part of neither: only nvidia-smi shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from qwen_vram.arithmetic.replay.allocator import CachingAllocator, OverLimitError
from qwen_vram.arithmetic.replay.generation import Generation, replay_generation
from qwen_vram.arithmetic.replay.linear import workspaces
from qwen_vram.arithmetic.replay.load import as_loaded, replay_load
from qwen_vram.arithmetic.weights import weight_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import ALLOCATION_STEP, FORMATS
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# Bytes that int8's own kernels add to the process on first use; an H100 shows the same (65 to 67 MB).
# measured: NVIDIA H200, torch 2.11.0+cu130, bitsandbytes 0.50.2, 2026-11-22.
INT8_KERNELS = 69_206_016
# Bytes that a second stream adds to the process: for copies of streamed layers or of a host cache, or a captured step.
# measured: NVIDIA H100, torch 2.11.0+cu130, 2026-11-25, 22 of 22 fresh processes.
SECOND_STREAM = 73_400_320

# The largest share that real runs reserved beyond a replay; docs/accuracy.md has the rows.
REPLAY_MISS = 0.01
# The step of the search for the least bytes that torch must be able to reserve.
SEARCHED_TO = 16 * 2**20


def _loaded(architecture: Architecture, profile: Profile, limit: int | None = None) -> CachingAllocator:
    """Return the allocator after a load; profiles with the same load share one replay."""
    return replay_load(architecture, as_loaded(profile), limit)


def workspace_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Allocated bytes between generations beside the weights' own bytes.

    They are cuBLAS's workspace, the rotary embedding's buffers, and the bytes that torch's allocator adds to the
    weights. It rounds each tensor up to 512 bytes, and does not split off a rest of up to 1 MiB from a large block. A
    captured decode step keeps tensors, and a second workspace for the stream on which it is captured.
    """
    resting = _loaded(architecture, profile).allocated - weight_bytes(architecture, profile).device
    kept = 0
    if profile.captures or profile.cache == "paged":
        from qwen_vram.arithmetic.decode_graph import step_sizes  # only for captured steps

        step = step_sizes(architecture, profile, workload)
        kept = sum(-(-size // ALLOCATION_STEP) * ALLOCATION_STEP for size in step)
    return sum(workspaces(architecture, profile)) + resting + kept


def load_peak_bytes(architecture: Architecture, profile: Profile) -> int:
    """The most allocated bytes while the model loads, with the tensor that is being quantized."""
    return _loaded(architecture, profile).peak


def load_reserved_bytes(architecture: Architecture, profile: Profile) -> int:
    """The most bytes that torch reserves while the model loads."""
    return _loaded(architecture, profile).peak_reserved


def pool_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """Bytes that the pool of a captured decode step reserves: its temporary tensors, counted without compilation."""
    if not profile.captures or workload.logits == "all":
        return 0
    allocator = CachingAllocator()
    generation = Generation(allocator, architecture, profile, replace(workload, padded=False))
    generation.warm = generation.warm_lt = generation.decoding = True
    for held in generation.cache:
        held.extend((0, 0))  # they are already allocated
    generation.step(1, workload.context_len - 1)
    return allocator.peak_reserved


class Replayed(NamedTuple):
    """The most bytes that torch's allocator allocated, and reserved, in a fresh process with one run of a workload."""

    peak: int
    reserved: int


@lru_cache(maxsize=2048)
def replay(architecture: Architecture, profile: Profile, workload: Workload) -> Replayed:
    """Replay the load and one run of the workload in a fresh process, as requests to torch's allocator (about 20 ms).

    Fragments depend on the order of thousands of requests: a process that ran other lengths before reserves more or
    less.
    """
    allocator = _loaded(architecture, profile).copy()
    allocator.peak = allocator.allocated
    replay_generation(allocator, architecture, profile, workload)
    return Replayed(allocator.peak, allocator.reserved + pool_bytes(architecture, profile, workload))


@lru_cache(maxsize=2048)
def least_reserved(architecture: Architecture, profile: Profile, workload: Workload, unlimited: int) -> int:
    """The least bytes that torch must be able to reserve: at most `unlimited`, with which it never returns a segment.

    Torch returns unused segments before it is out of memory. The least is searched if it can be lower than `unlimited`
    by more than `SEARCHED_TO` and the share that is added for the error of a replay.
    """
    *_, (_, least) = _bounds(architecture, profile, workload, unlimited)
    return least


def least_reserved_is_at_most(
    architecture: Architecture, profile: Profile, workload: Workload, unlimited: int, limit: int
) -> bool:
    """Tell if `least_reserved` is at most `limit`, by the same search, which ends when that is known."""
    for low, high in _bounds(architecture, profile, workload, unlimited):
        if high <= limit or low > limit:
            break
    return high <= limit


def _bounds(
    architecture: Architecture, profile: Profile, workload: Workload, unlimited: int
) -> Iterator[tuple[int, int]]:
    """Yield narrower and narrower bounds of `least_reserved`; the upper bound of the last pair is its value."""
    low, high = replay(architecture, profile, workload).peak, unlimited
    if unlimited <= (low + SEARCHED_TO) * (1 + REPLAY_MISS):
        yield unlimited, unlimited
        return
    while True:
        yield min(unlimited, int(low * (1 + REPLAY_MISS))), min(unlimited, int(high * (1 + REPLAY_MISS)))
        if high - low <= SEARCHED_TO:
            return
        middle = (low + high) // 2
        low, high = (low, middle) if _runs_within(architecture, profile, workload, middle) else (middle, high)


@lru_cache(maxsize=4096)
def _runs_within(architecture: Architecture, profile: Profile, workload: Workload, limit: int) -> bool:
    """Tell if loading and a first run succeed if torch can reserve `limit` bytes."""
    try:
        loaded = _loaded(architecture, profile)
        if loaded.peak_reserved > limit:
            loaded = _loaded(architecture, profile, limit)
        running = limit - pool_bytes(architecture, profile, workload)
        replay_generation(loaded.copy(running), architecture, profile, workload)
    except OverLimitError:
        return False
    return True


def process_bytes(peak_reserved: int, profile: Profile, machine: Machine, held: int = 0) -> int:
    """Return the bytes that nvidia-smi shows for the process: reserved memory, CUDA context, and loaded kernels.

    Args:
        held: Bytes that the process takes beside torch's memory before it loads this model. Kernels and streams of
            closed models stay in the process.
    """
    kernels = machine.lazy_kernels + (INT8_KERNELS if FORMATS[profile.weights].has_outliers else 0)
    second = profile.kv_device == "host" or profile.streamed_layers or profile.captures
    return peak_reserved + max(held, machine.cuda_context + kernels + (SECOND_STREAM if second else 0))
