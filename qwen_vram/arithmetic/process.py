"""Process memory beside torch's tensors: CUDA context, kernels and libraries.

`workspace` is in torch's allocated bytes, the allocator's fragments only in its reserved bytes, and the CUDA context
with its kernels in neither: only nvidia-smi shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from qwen_vram.arithmetic.decode_graph import step_sizes
from qwen_vram.arithmetic.replay.allocator import CachingAllocator, OutOfRoomError
from qwen_vram.arithmetic.replay.generation import Generation, replay_generation
from qwen_vram.arithmetic.replay.linear import workspaces
from qwen_vram.arithmetic.replay.load import as_loaded, replay_load
from qwen_vram.arithmetic.weights import weight_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import ALLOCATION_STEP, FORMATS
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# What int8's own kernels add to the process on first use, the same on an H100 (65 to 67 MB).
# measured: NVIDIA H200, torch 2.11.0+cu130, bitsandbytes 0.50.2, 2026-11-22.
INT8_KERNELS = 69_206_016
# What a second stream adds to the process: copies of layers that stream or of a KV cache on the host, a captured step.
# measured: NVIDIA H100, torch 2.11.0+cu130, 2026-11-25, 22 of 22 fresh processes.
SECOND_STREAM = 73_400_320

# What real runs reserved beyond a replay at most; docs/accuracy.md has the rows.
REPLAY_MISS = 0.01
# How closely the least that torch must reserve is searched, in bytes.
SEARCHED_TO = 16 * 2**20


def _loaded(architecture: Architecture, profile: Profile, limit: int | None = None) -> CachingAllocator:
    """Return the allocator after a load; profiles that load alike share one replay."""
    return replay_load(architecture, as_loaded(profile), limit)


def workspace_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """What stays allocated at rest beside the weights' own bytes.

    cuBLAS's workspace, the rotary embedding's buffers, and what torch's allocator adds to the weights: each tensor is
    rounded up to 512 bytes, and up to 1 MiB of a large block that could not be split off stays with it. A captured
    decode step keeps tensors, and a second workspace for the stream on which it is captured.
    """
    resting = _loaded(architecture, profile).allocated - weight_bytes(architecture, profile).device
    step = step_sizes(architecture, profile, workload)
    kept = sum(-(-size // ALLOCATION_STEP) * ALLOCATION_STEP for size in step)
    return sum(workspaces(architecture, profile)) + resting + kept


def load_peak_bytes(architecture: Architecture, profile: Profile) -> int:
    """The most that is allocated while loading, the tensor that is being quantized included."""
    return _loaded(architecture, profile).peak


def load_reserved_bytes(architecture: Architecture, profile: Profile) -> int:
    """The most that torch reserves while loading."""
    return _loaded(architecture, profile).peak_reserved


def pool_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """What the pool of a captured decode step reserves: its temporary tensors, had it not been compiled."""
    if not profile.captures or workload.logits == "all":
        return 0
    allocator = CachingAllocator()
    generation = Generation(allocator, architecture, profile, replace(workload, padded=False))
    generation.warm = generation.warm_lt = True
    for held in generation.cache:
        held.extend((0, 0))  # they are there already
    generation.step(1, workload.context_len - 1)
    return allocator.peak_reserved


class Replayed(NamedTuple):
    """What torch's allocator has in a fresh process that ran a workload once, in bytes: both the most of the run."""

    peak: int
    reserved: int


@lru_cache(maxsize=256)
def replay(architecture: Architecture, profile: Profile, workload: Workload) -> Replayed:
    """Load the model and run the workload once, in a fresh process, as requests to torch's allocator. Some 20 ms.

    Fragments depend on the order of thousands of requests: a process that ran other lengths before
    reserves more or less.
    """
    allocator = _loaded(architecture, profile).copy()
    allocator.peak = allocator.allocated
    replay_generation(allocator, architecture, profile, workload)
    return Replayed(allocator.peak, allocator.reserved + pool_bytes(architecture, profile, workload))


@lru_cache(maxsize=256)
def least_reserved(architecture: Architecture, profile: Profile, workload: Workload, roomy: int) -> int:
    """The least that torch must be able to reserve: `roomy`, where it never gives a segment back, or less.

    Torch gives unused segments back before it is out of memory. The least is searched if it can be lower than
    `roomy` by more than `SEARCHED_TO` and the share that is added for what a replay can miss.
    """
    *_, (_, least) = _bounds(architecture, profile, workload, roomy)
    return least


def least_reserved_is_at_most(
    architecture: Architecture, profile: Profile, workload: Workload, roomy: int, limit: int
) -> bool:
    """Tell if `least_reserved` is: the same search, which ends once that is known."""
    for low, high in _bounds(architecture, profile, workload, roomy):
        if high <= limit or low > limit:
            break
    return high <= limit


def _bounds(architecture: Architecture, profile: Profile, workload: Workload, roomy: int) -> Iterator[tuple[int, int]]:
    """Bounds of `least_reserved`, narrower and narrower; the last pair's upper one is it."""
    low, high = replay(architecture, profile, workload).peak, roomy
    if roomy <= (low + SEARCHED_TO) * (1 + REPLAY_MISS):
        yield roomy, roomy
        return
    while True:
        yield min(roomy, int(low * (1 + REPLAY_MISS))), min(roomy, int(high * (1 + REPLAY_MISS)))
        if high - low <= SEARCHED_TO:
            return
        middle = (low + high) // 2
        low, high = (low, middle) if _runs_within(architecture, profile, workload, middle) else (middle, high)


def _runs_within(architecture: Architecture, profile: Profile, workload: Workload, limit: int) -> bool:
    """Tell if loading and a first run succeed where torch can reserve `limit` bytes."""
    try:
        loaded = _loaded(architecture, profile)
        if loaded.peak_reserved > limit:
            loaded = _loaded(architecture, profile, limit)
        running = limit - pool_bytes(architecture, profile, workload)
        replay_generation(loaded.copy(running), architecture, profile, workload)
    except OutOfRoomError:
        return False
    return True


def process_bytes(peak_reserved: int, profile: Profile, machine: Machine, held: int = 0) -> int:
    """Return what nvidia-smi shows for the process: reserved memory, the CUDA context, and what is loaded on first use.

    Args:
        held: What the process takes beside torch's memory before it loads this model. Kernels and streams of models
            that are closed stay in the process.
    """
    kernels = machine.lazy_kernels + (INT8_KERNELS if FORMATS[profile.weights].has_outliers else 0)
    second = profile.kv_device == "host" or profile.streamed_layers or profile.captures
    return peak_reserved + max(held, machine.cuda_context + kernels + (SECOND_STREAM if second else 0))
