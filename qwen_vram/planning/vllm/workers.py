"""Division of a model over vLLM's workers, and the bytes of weights on the fullest one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qwen_vram.arithmetic.pipeline import slices
from qwen_vram.errors import WorkloadError
from qwen_vram.planning.vllm.formats import ServedWeights
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.layers import LayerSpec, Weight

# Rows of the embedding and of the head are a multiple of it.
# Source: vLLM 0.33.0, vllm/model_executor/layers/vocab_parallel_embedding.py:36.
_VOCAB_ROWS = 64
# Matrices whose columns are divided; the rows of all others are.
# Source: vLLM 0.33.0, vllm/model_executor/models/qwen2.py, RowParallelLinear.
_BY_COLUMNS = ("o_proj", "down_proj")
_KEYS_AND_VALUES = ("k_proj", "v_proj")


class Workers(NamedTuple):
    """Processes of vLLM that share a model.

    Attributes:
        tensor: Workers that share every layer (`--tensor-parallel-size`).
        pipeline: Groups of workers with consecutive layers (`--pipeline-parallel-size`).
        nodes: Machines that they are spread over.
    """

    tensor: int
    pipeline: int
    nodes: int

    @property
    def on_a_node(self) -> int:
        """The workers of one machine."""
        return self.tensor * self.pipeline // self.nodes


def workers_of(
    architecture: Architecture, devices: int | None, nodes: int, tensor: int | None, pipeline: int | None
) -> Workers:
    """Return the division of a model: by the caller, or with every layer over the GPUs of a node if heads divide.

    Args:
        devices: GPUs of a node; `None` is a CPU, with any number of workers.

    Raises:
        WorkloadError: a number that is out of range, does not divide the heads, or is not that of the GPUs.
    """
    for name, value in (("nodes", nodes), ("tensor_parallel", tensor), ("pipeline_parallel", pipeline)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise WorkloadError(f"{name} must be a positive whole number, got {value!r}", name=name, got=value)
    if devices is None:
        devices = max(1, (tensor or 1) * (pipeline or 1) // nodes)
    every = devices * nodes
    if tensor is None:
        wanted = every // pipeline if pipeline else devices
        tensor = wanted if pipeline or _divides(architecture, wanted) else 1
    pipeline = max(1, every // tensor) if pipeline is None else pipeline
    if tensor * pipeline != every:
        raise WorkloadError(
            f"tensor_parallel {tensor} x pipeline_parallel {pipeline} is {tensor * pipeline} workers, and the plan has "
            f"{every}: {nodes} node(s) with {devices}; choose numbers whose product is {every}",
            name="tensor_parallel",
            got=tensor,
        )
    if not _divides(architecture, tensor):
        heads = sorted({(one.attention.heads, one.attention.key_value_heads) for one, _ in architecture.kinds})
        raise WorkloadError(
            f"tensor_parallel {tensor} does not divide the model's heads (queries, keys) {heads} in vLLM; choose a "
            "divisor of both, or use pipeline_parallel",
            name="tensor_parallel",
            got=tensor,
        )
    if pipeline > architecture.num_hidden_layers:
        raise WorkloadError(
            f"pipeline_parallel {pipeline} is more than the model's {architecture.num_hidden_layers} layers",
            name="pipeline_parallel",
            got=pipeline,
        )
    return Workers(tensor, pipeline, nodes)


def _divides(architecture: Architecture, tensor: int) -> bool:
    """Tell if vLLM can share heads and the MLP among `tensor` workers.

    Source: vLLM 0.33.0, vllm/config/model.py:1559, vllm/model_executor/models/qwen2.py:141.
    """
    return all(
        one.attention.heads % tensor == 0
        and one.inner_size % tensor == 0
        and (one.attention.key_value_heads % tensor == 0 or tensor % one.attention.key_value_heads == 0)
        for one, _ in architecture.kinds
    )


def layers_of(layers: int, pipeline: int) -> tuple[int, ...]:
    """Return the number of layers of each group, as vLLM divides them.

    Source: vLLM 0.33.0, vllm/distributed/utils.py:198, get_pp_indices.

    >>> layers_of(28, 3)
    (9, 10, 9)
    """
    counts = [layers // pipeline] * pipeline
    for number in range(2, layers % pipeline + 2):
        counts[-number] += 1
    return tuple(counts)


def heads_of(layer: LayerSpec, workers: Workers) -> int:
    """Return the heads of keys and values that a worker has; a head may be on several workers."""
    return max(1, layer.attention.key_value_heads // workers.tensor)


def weight_bytes(served: ServedWeights, workers: Workers) -> int:
    """Return the bytes of weights on the fullest worker.

    They are exact for one worker, and for formats whose bytes follow from the shape. The tensors of a quantized
    checkpoint are divided by the number of workers and rounded up.
    """
    counts = layers_of(served.architecture.num_hidden_layers, workers.pipeline)
    return max(_part_bytes(part, served, workers) for part in slices(served.architecture, counts))


def _part_bytes(part: Architecture, served: ServedWeights, workers: Workers) -> int:
    stored = part.stored
    if stored is None:
        layers = sum(
            count * sum(_shard_bytes(weight, layer, served, workers) for weight in layer.weights)
            for layer, count in part.kinds
        )
    else:
        # A norm or a table of indices is on every worker: less than 0.1 % of a layer.
        layers = sum(-(-tensor.nbytes // workers.tensor) for layer in stored.layers for tensor in layer)
    return layers + sum(_outer_bytes(part, served, workers))


def _outer_bytes(part: Architecture, served: ServedWeights, workers: Workers) -> Iterator[int]:
    """Yield the bytes of the embedding, the last norm and the head on a worker.

    A tied head is the embedding's tensor, which the last group has a copy of.
    """
    plain = FORMATS[served.dtype]
    rows = -(-part.vocab_size // _VOCAB_ROWS) * _VOCAB_ROWS // workers.tensor
    table = (rows, part.hidden_size)
    if part.starts or (part.ends and part.tie_word_embeddings):
        yield plain.nbytes(table)
    if part.ends:
        yield plain.nbytes((part.hidden_size,))
    if part.ends and not part.tie_word_embeddings:
        stored = served.architecture.stored
        if stored is not None and served.architecture.stored_head:
            yield -(-stored.head_bytes // workers.tensor)
        else:
            yield FORMATS[served.head].nbytes(table)


def _shard_bytes(weight: Weight, layer: LayerSpec, served: ServedWeights, workers: Workers) -> int:
    """Return the bytes of a layer's weight on a worker."""
    plain = FORMATS[served.dtype]
    shape = weight.shape
    if weight.role != "norm" and workers.tensor > 1:
        if weight.module in _KEYS_AND_VALUES:
            share = layer.attention.key_value_heads // heads_of(layer, workers)
        else:
            share = workers.tensor
        if weight.module not in _BY_COLUMNS:
            shape = (-(-shape[0] // share), *shape[1:])
        elif len(shape) == 2:
            shape = (shape[0], -(-shape[1] // share))
    storage = FORMATS[served.matrices] if weight.is_linear else plain
    return storage.nbytes(shape)
