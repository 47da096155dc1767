"""One replica of a fleet: its GPUs, their memory, and the times of its steps."""

from __future__ import annotations

from typing import NamedTuple

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.tensor_parallel import shard
from qwen_vram.arithmetic.timing.batched_step import Connection, StepTimes
from qwen_vram.fleet.card_memory import CardMemory, Fixed, fixed_of_transformers, fixed_of_vllm
from qwen_vram.fleet.engines import Engine, profile_of
from qwen_vram.fleet.simulation.simulate import Limits, largest_below
from qwen_vram.planning.vllm.memory import Limits as ServedLimits
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.cards.find import machine_of
from qwen_vram.spec.cards.rows import Gpu, Link
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.workload import Workload

# The share of a link's rate that sums of all GPUs use, and the seconds of a sum of few bytes. 8 GPUs with NVLink added
# up large buffers at 360 of 450 GB/s without multicast, and two added up 64 KiB in 6 us. Eight RTX 5090 with PCIe had
# 28 of 63 GB/s, and eight A800 took 46 us for 8 KiB.
# Source: https://github.com/NVIDIA/nccl/issues/1259 (6 us) and /1639 (28 GB/s),
# https://github.com/vllm-project/vllm/issues/50576 (46 us); the 360 GB/s are not from a source that was read.
_LINK_SHARE: dict[Link, float] = {"NVLink": 0.8, "PCIe": 0.45}
_SUM_START: dict[Link, float] = {"NVLink": 8e-6, "PCIe": 30e-6}


class Replica(NamedTuple):
    """A replica: one server of the engine on `size` GPUs of one machine.

    Attributes:
        gpu: The card.
        weights: The format of the weights.
        size: GPUs that share every layer (tensor parallelism).
        memory: The bytes of each card.
        limits: Blocks of the cache, sequences at once, and tokens of a step.
        times: The times of its steps.
        needed: Bytes of a card that one request of the longest lengths needs.
        budget: Bytes of a card that the engine takes.
        longest_blocks: Blocks of one request of the longest lengths.
        estimate: The estimate of a step on one card.
    """

    gpu: Gpu
    weights: str
    size: int
    memory: CardMemory
    limits: Limits
    times: StepTimes
    needed: int
    budget: int
    longest_blocks: int
    estimate: Estimate

    @property
    def fits(self) -> bool:
        """Tell if one request of the longest lengths fits."""
        return self.needed <= self.budget


def make_replica(
    label: str,
    architecture: Architecture,
    engine: Engine,
    gpu: Gpu,
    weights: str,
    size: int,
    *,
    longest: tuple[int, int],
    mean_tokens: float,
    sequences: int,
    step_tokens: int,
    slowdown: float = 1.0,
) -> Replica:
    """Return the replica of an engine on `size` cards, whether it fits or not.

    Args:
        longest: The longest prompt and the longest answer.
        mean_tokens: Tokens of the mean request, which decide the number of sequences at once.
        sequences: The most sequences at once.
        step_tokens: The most tokens of a step.
        slowdown: A factor of all times.

    Raises:
        WorkloadError: `size` does not divide the heads, or a context exceeds the model's positions.
        ConfigError: a format that does not store matrices of this shape.
    """
    part = shard(architecture, size)
    profile = profile_of(engine, weights, architecture, step_tokens)
    step = Workload(prompt_len=min(step_tokens, part.max_position_embeddings - 1), max_new_tokens=1)
    known = estimate(label, part, profile, step, machine=machine_of(gpu))
    budget = int(engine.utilization * gpu.memory)

    def counted(at_once: int) -> tuple[Fixed, Limits]:
        if engine.fused:
            served = ServedLimits(sum(longest), at_once, step_tokens)
            fixed = fixed_of_vllm(architecture, profile, gpu, size, known, served)
        else:
            fixed = fixed_of_transformers(engine, known, at_once)
        blocks = max(0, (budget - fixed.total) // fixed.block - engine.spare_blocks)
        return fixed, Limits(blocks, engine.block_tokens, at_once, step_tokens)

    def holds(at_once: int) -> bool:
        return counted(at_once)[1].blocks * engine.block_tokens >= at_once * mean_tokens

    # Fewer sequences leave memory of their logits for more blocks.
    fixed, limits = counted(max(1, largest_below(sequences, holds)))
    longest_blocks = limits.blocks_of(sum(longest))
    times = StepTimes(
        part,
        profile,
        machine_of(gpu, fp8=engine.fused and FORMATS[weights].multiplies_fp8),
        Connection(size, _LINK_SHARE[gpu.link] * gpu.link_rate, _SUM_START[gpu.link]),
        fused=engine.fused,
        slowdown=slowdown,
    )
    memory = fixed.card(gpu, limits.blocks + engine.spare_blocks if limits.blocks else 0)
    needed = fixed.total + (longest_blocks + engine.spare_blocks) * fixed.block
    return Replica(gpu, weights, size, memory, limits, times, needed, budget, longest_blocks, known)
