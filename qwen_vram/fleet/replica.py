"""One replica of a fleet: its GPUs, the memory of each by part, and the times of its steps."""

from __future__ import annotations

from typing import NamedTuple

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.kv_cache import all_kv_bytes
from qwen_vram.arithmetic.tensor_parallel import shard
from qwen_vram.arithmetic.timing.batched_step import Connection, StepTimes
from qwen_vram.fleet.engines import Engine, profile_of
from qwen_vram.fleet.simulate import Limits
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.gpus import Gpu, Link, machine_of
from qwen_vram.spec.workload import Workload

# CUDA graphs of vLLM. Logs of models of 7B and more show 0.31 to 0.96 GiB; the largest is counted.
# Source: "Graph capturing finished in N secs, took X GiB", vllm/v1/worker/gpu_model_runner.py.
_GRAPHS = 2**30
# NCCL's buffers of a replica with several GPUs. Two H100 had 3.58 GiB outside of torch, and one 1.79; two RTX 4090 had
# 0.25 GiB. Source: https://github.com/vllm-project/vllm/pull/10511, https://github.com/vllm-project/vllm/issues/13061.
_NCCL: dict[Link, int] = {"NVLink": 1_922_000_000, "PCIe": 268_000_000}
# The share of a link's rate that sums of all GPUs use, and the seconds of a sum of few bytes. 8 GPUs with NVLink added
# up large buffers at 360 of 450 GB/s without multicast; two added up 64 KiB in 6 us. Eight with PCIe had 28 of 63 GB/s,
# and 46 us for 8 KiB. Source: https://github.com/NVIDIA/nccl/issues/1259 (6 us), /1639 (28 GB/s), and
# https://github.com/vllm-project/vllm/issues/50576 (46 us); 360 GB/s is the peak that NVIDIA's guide states.
_LINK_SHARE: dict[Link, float] = {"NVLink": 0.8, "PCIe": 0.45}
_SUM_START: dict[Link, float] = {"NVLink": 8e-6, "PCIe": 30e-6}


class CardMemory(NamedTuple):
    """Bytes of one card by part; they sum to `total`.

    Attributes:
        weights: The card's part of the weights.
        kv_cache: Whole blocks of keys and values.
        activations: Tensors of a step, and cuBLAS's workspace.
        graphs: Captured steps.
        context: The CUDA context and loaded kernels.
        communication: Buffers for sums over several GPUs.
        free: What the engine leaves free, and the rest of a block.
        total: The memory of the card that CUDA shows.
    """

    weights: int
    kv_cache: int
    activations: int
    graphs: int
    context: int
    communication: int
    free: int
    total: int

    @property
    def fixed(self) -> int:
        """The bytes that do not depend on the number of blocks."""
        return self.weights + self.activations + self.graphs + self.context + self.communication


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
    fixed = {
        "weights": known.weights,
        "activations": known.tensors + known.workspace + _logits(part, size, sequences),
        "graphs": _GRAPHS if profile.captures else 0,
        "context": known.machine.cuda_context,
        "communication": _NCCL[gpu.link] if size > 1 else 0,
    }
    block = all_kv_bytes(part, profile, tokens=engine.block_tokens, batch_size=1)
    budget = int(engine.utilization * gpu.memory)
    left = budget - sum(fixed.values())
    blocks = max(0, left // block)
    limits = Limits(blocks, engine.block_tokens, sequences, step_tokens)
    longest_blocks = limits.blocks_of(sum(longest))
    needed = sum(fixed.values()) + longest_blocks * block
    held = max(1, int(blocks * engine.block_tokens // mean_tokens))
    cache = blocks * block
    memory = CardMemory(**fixed, kv_cache=cache, free=gpu.memory - sum(fixed.values()) - cache, total=gpu.memory)
    times = StepTimes(
        part,
        profile,
        machine_of(gpu, fp8=engine.fused and FORMATS[weights].multiplies_fp8),
        Connection(size, _LINK_SHARE[gpu.link] * gpu.link_rate, _SUM_START[gpu.link]),
        fused=engine.fused,
        slowdown=slowdown,
    )
    limits = limits._replace(sequences=min(sequences, held))
    return Replica(gpu, weights, size, memory, limits, times, needed, budget, longest_blocks, known)


def _logits(part: Architecture, size: int, sequences: int) -> int:
    """Bytes of a step's logits in float32, which every card of a replica has for the whole vocabulary."""
    return 4 * part.vocab_size * size * sequences
