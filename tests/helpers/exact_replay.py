"""A run through an allocator that splits off every rest, so that a tensor takes its own bytes, to 512."""

from typing import NamedTuple

from qwen_vram.arithmetic.decode_graph import step_sizes
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.replay.allocator import CachingAllocator
from qwen_vram.arithmetic.replay.generation import replay_generation
from qwen_vram.arithmetic.replay.linear import workspaces
from qwen_vram.arithmetic.replay.load import load_into


class ExactReplay(NamedTuple):
    """Bytes: after the load, the most of the run, what the run left, and the peak by one layer and the last steps."""

    loaded: int
    peak: int
    left: int
    summed: int


def exact_replay(estimate: Estimate) -> ExactReplay:
    """Load and run what was estimated for one device, through all layers and steps."""
    what = (estimate.architecture, estimate.profile)
    allocator = CachingAllocator(unsplit=511)
    load_into(allocator, *what)
    allocator.peak = loaded = allocator.allocated
    replay_generation(allocator, *what, estimate.workload)
    kept = sum(workspaces(*what)) + sum(step_sizes(*what, estimate.workload))
    summed = loaded + kept + estimate.kv_cache + estimate.tensors
    return ExactReplay(loaded, allocator.peak, allocator.allocated, summed)
