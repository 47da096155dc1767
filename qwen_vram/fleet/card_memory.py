"""The memory of one card of a replica by part, for each engine."""

from __future__ import annotations

from typing import NamedTuple

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.kv_cache import all_kv_bytes
from qwen_vram.fleet.engines import Engine
from qwen_vram.planning.vllm.formats import STORED, ServedWeights, served_cache, served_weights
from qwen_vram.planning.vllm.memory import Limits, Worker, memory_of
from qwen_vram.planning.vllm.workers import Workers
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.cards.rows import Gpu, Link
from qwen_vram.spec.profile import Profile

# NCCL's buffers of a replica with several GPUs. Two H100 had 3.58 GiB outside of torch, and one had 1.79. Two RTX 4090
# had 0.25 GiB.
# Source: https://github.com/vllm-project/vllm/pull/10511, https://github.com/vllm-project/vllm/issues/13061.
_NCCL: dict[Link, int] = {"NVLink": 1_922_000_000, "PCIe": 268_000_000}


class CardMemory(NamedTuple):
    """Bytes of one card by part; all but `total` sum to it.

    Attributes:
        weights: The card's part of the weights.
        kv_cache: Whole blocks of keys and values.
        activations: Tensors of a step, and buffers of kernels.
        graphs: Captured steps.
        context: The CUDA context and loaded kernels.
        communication: Buffers for sums over several GPUs.
        free: The bytes that the engine leaves free, and the rest of a block.
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
        return self.total - self.kv_cache - self.free


class Fixed(NamedTuple):
    """Bytes of a card that do not depend on the number of blocks, the margin that stays free, and those of a block."""

    weights: int
    activations: int
    graphs: int
    context: int
    communication: int
    margin: int
    block: int

    @property
    def total(self) -> int:
        """The sum of all but the block."""
        return sum(self[:-1])

    def card(self, gpu: Gpu, blocks: int) -> CardMemory:
        """Return the memory of a card with a number of blocks."""
        kv_cache = blocks * self.block
        used = self[:-2]
        return CardMemory(self.weights, kv_cache, *used[1:], gpu.memory - sum(used) - kv_cache, gpu.memory)


def fixed_of_vllm(
    architecture: Architecture, profile: Profile, gpu: Gpu, size: int, known: Estimate, limits: Limits
) -> Fixed:
    """Return the fixed bytes of a worker of vLLM, as a plan for vLLM counts them.

    Args:
        architecture: The whole model.
        known: The estimate of a step, for the CUDA context.
        limits: Tokens of a sequence, sequences at once, and tokens of a step.
    """
    worker = Worker(gpu.memory, known.machine, on_cpu=False, graphs=profile.captures, capability=gpu.capability)
    cache = served_cache(architecture, profile, None, on_cpu=False)
    counted = memory_of(served(architecture, profile), cache, Workers(size, 1, 1), limits, worker)
    return Fixed(
        weights=counted.weights,
        activations=counted.activations + counted.buffers,
        graphs=counted.graphs,
        context=counted.context,
        communication=_NCCL[gpu.link] if size > 1 else 0,
        margin=counted.margin,
        block=counted.block * counted.token,
    )


def fixed_of_transformers(engine: Engine, known: Estimate, sequences: int) -> Fixed:
    """Return the fixed bytes of `transformers serve`, by the estimate of one step with logits of every sequence."""
    assert known.architecture is not None
    logits = 4 * known.architecture.vocab_size * sequences  # float32
    block = all_kv_bytes(known.architecture, known.profile, tokens=engine.block_tokens, batch_size=1)
    context = known.machine.cuda_context + known.machine.lazy_kernels
    return Fixed(known.weights, known.tensors + known.workspace + logits, 0, context, 0, 0, block)


def served(architecture: Architecture, profile: Profile) -> ServedWeights:
    """Return the weights as vLLM has them; an export counts as if it had been made."""
    if architecture.stored_format is None and profile.weights in STORED:
        quantization = STORED[profile.weights]
        return ServedWeights(profile.weights, profile.dtype, profile.dtype, quantization, architecture, ())
    return served_weights(architecture, profile, None, lambda _: 0)
