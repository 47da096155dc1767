"""The arguments of `vllm serve` for a plan, as data and as a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.checkpoints.cpu_info import numa_nodes
from qwen_vram.checkpoints.files.place import place_of
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.errors import UnknownNameError, WorkloadError
from qwen_vram.planning.capacity.available_memory import visible_gpus
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.planning.capacity.hardware import is_old
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.planning.vllm.formats import ServedWeights, served_cache, served_weights, vllm_dtype
from qwen_vram.planning.vllm.memory import Limits, VllmMemory, Worker, memory_of, needed_cache
from qwen_vram.planning.vllm.refusals import check_mapped, savers_lost
from qwen_vram.planning.vllm.workers import Workers, weight_bytes, workers_of
from qwen_vram.units import format_gib

Executor = Literal["mp", "ray"]
Value = str | int | float | bool
_EXECUTORS = ("mp", "ray")
# The most tokens of a step for a plan without chunks: vLLM's own value for a server on an H100.
# Source: vLLM 0.33.0, vllm/engine/arg_utils.py:2989.
_STEP_TOKENS = 8192


class VllmCommand(list[str]):
    """A command as a list of strings; as a text it is one line, quoted for a shell."""

    def __str__(self) -> str:
        """The command in one line, quoted for a shell."""
        return shlex.join(self)


@dataclass(frozen=True, kw_only=True)
class VllmArguments:
    """The arguments of `vllm serve` that run a plan.

    Attributes:
        model: The checkpoint: a folder, or a name on the hub.
        arguments: The value of each option by its name without dashes, such as `"max-model-len"`; `True` is a flag.
        environment: Variables that the process needs.
        notes: The parts of the plan that are different in vLLM, or lost, with their costs.
        memory: The bytes of the fullest worker, term by term.
        workers: The processes that share the model.
    """

    model: str
    arguments: Mapping[str, Value]
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: VllmMemory
    workers: Workers

    def command(self, program: str = "vllm") -> VllmCommand:
        """Return the command that starts the server.

        Args:
            program: The executable of vLLM.
        """
        words = [program, "serve", self.model]
        for name, value in self.arguments.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return VllmCommand(words)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`; sizes in bytes."""
        return {
            "model": self.model,
            "arguments": dict(self.arguments),
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "memory": self.memory.to_dict(),
            "workers": self.workers._asdict(),
            "command": list(self.command()),
            "shell": str(self.command()),
        }

    def __str__(self) -> str:
        """The notes, the bytes, and the command in one line."""
        return "\n".join((*self.notes, memory_line(self.memory), str(self.command())))


class Nodes(NamedTuple):
    """The division of a model over GPUs and machines, as the caller asks for it.

    Attributes:
        tensor_parallel, pipeline_parallel: Workers that share layers, and groups of layers; `None` is chosen.
        nodes, node_rank, master_addr: Machines with the plan's GPUs each, this machine's number, and the first one's
            address.
        executor: `"mp"` or `"ray"`; `None` is vLLM's own choice on one machine, and `"mp"` on several.
    """

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    executor: Executor | None = None


class Address(NamedTuple):
    """The address of the server, and the name of the model in requests; `None` is the model's own."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None


def vllm_arguments(
    estimate: Estimate,
    budget: Budget,
    model: str | None,
    sequences: int,
    *,
    nodes: Nodes,
    address: Address,
    checkpoint: str | Path | None = None,
    kv_cache_dtype: str | None = None,
) -> VllmArguments:
    """Return the arguments of `vllm serve` for a plan. `Plan.to_vllm` describes the arguments and the errors."""
    architecture, profile, workload = estimate.architecture, estimate.profile, estimate.workload
    assert architecture is not None
    check_mapped(architecture, profile, model)
    on_cpu = budget.vram is None
    _check_nodes(nodes)
    workers = workers_of(
        architecture,
        None if on_cpu else max(1, len(budget.devices)),
        nodes.nodes,
        nodes.tensor_parallel,
        nodes.pipeline_parallel,
    )
    export = None if checkpoint is None else resolve_model(checkpoint)[1]

    def nbytes(served: ServedWeights) -> int:
        return weight_bytes(served, workers)

    served = served_weights(architecture, profile, export, nbytes)
    cache = served_cache(architecture, profile, kv_cache_dtype, on_cpu=on_cpu)
    whole = min(workload.prompt_len * sequences, _STEP_TOKENS)
    step = max(sequences, profile.prefill_chunk_size or whole)
    limits = Limits(workload.context_len, sequences, step)
    # This library captures steps on one GPU only, and vLLM on several too.
    graphs = not on_cpu and (profile.captures or len(budget.devices) > 1)
    share = _of_a_worker(budget, workers)
    worker = Worker(share, estimate.machine, on_cpu=on_cpu, graphs=graphs, capability=budget.capability)
    memory = memory_of(served, cache, workers, limits, worker)
    needed = needed_cache(memory, limits)
    eager: tuple[str, ...] = ()
    if graphs and memory.kv_cache < needed:
        eager = (f"CUDA graphs do not fit, and are off: {memory.graphs:,} bytes of them on a worker",)
        memory = memory_of(served, cache, workers, limits, worker._replace(graphs=False))
    if memory.kv_cache < needed:
        _refuse(estimate, memory, needed, sequences, served.notes)
    options: dict[str, Value] = {
        "dtype": vllm_dtype(profile, old_gpu=is_old(budget)),
        "kv-cache-memory-bytes": memory.kv_cache,
        "max-model-len": limits.model_len,
        "max-num-seqs": limits.sequences,
        "max-num-batched-tokens": limits.step_tokens,
        "kv-cache-dtype": cache.dtype,
    }
    if not on_cpu and (fraction := _utilization(budget)) is not None:
        options["gpu-memory-utilization"] = fraction
    if served.quantization is not None:
        options["quantization"] = served.quantization
    # On a CPU, a pipeline waits for tensors that only the warm-up makes, and this option skips the warm-up.
    # Source: vLLM 0.32.0, vllm/v1/worker/cpu_worker.py, _should_warm_up_model, and gpu_model_runner.py:3174.
    if not memory.graphs and not (on_cpu and workers.pipeline > 1):
        options["enforce-eager"] = True
    options |= _parallel(workers, nodes)
    options |= {"host": address.host, "port": address.port}
    options["served-model-name"] = address.served_model_name or estimate.model
    notes = (*served.notes, *cache.notes, *savers_lost(profile), *eager, *_of_nodes(workers, on_cpu=on_cpu))
    return VllmArguments(
        model=_opened(str(model) if checkpoint is None else str(checkpoint), estimate.model, own=checkpoint is None),
        arguments=options,
        environment=_unbound(workers) if on_cpu else _visible(budget),
        notes=notes,
        memory=memory,
        workers=workers,
    )


def memory_line(memory: VllmMemory) -> str:
    """Return the terms of a worker's budget in one line."""
    return (
        f"of {memory.budget:,} bytes a worker: {_terms(memory)}, keys and values {memory.kv_cache:,} "
        f"({memory.tokens:,} tokens, {memory.concurrency:.2f} sequences)"
    )


def _terms(memory: VllmMemory) -> str:
    parts = ("context", "weights", "buffers", "activations", "graphs", "margin")
    return ", ".join(f"{name} {getattr(memory, name):,}" for name in parts if getattr(memory, name))


def _refuse(estimate: Estimate, memory: VllmMemory, needed: int, sequences: int, notes: Iterable[str]) -> None:
    """Refuse a plan whose budget does not hold vLLM's own memory with the planned sequences."""
    least = memory.budget - memory.kv_cache + needed
    said = "".join(f"; {note}" for note in notes)
    raise DoesNotFitError(
        f"{estimate.model} needs {format_gib(least)} on a worker in vLLM for {sequences} sequence(s) of "
        f"{estimate.workload.context_len:,} tokens, and the plan gives {format_gib(memory.budget)} "
        f"({_terms(memory)}, keys and values {needed:,}){said}; "
        "give a larger budget, shorter sequences or more workers",
        needed_bytes=least,
        budget_bytes=memory.budget,
        estimate=estimate,
        nearest=None,
    )


def _of_a_worker(budget: Budget, workers: Workers) -> int:
    """Return the bytes that the budget gives the worker with the least."""
    if budget.vram is None:
        return budget.ram // workers.on_a_node
    return min(budget.devices.values(), default=budget.vram)


def _check_nodes(nodes: Nodes) -> None:
    if nodes.executor is not None and nodes.executor not in _EXECUTORS:
        raise UnknownNameError("executor", nodes.executor, _EXECUTORS)
    if nodes.nodes == 1 and (nodes.node_rank or nodes.master_addr):
        raise WorkloadError(
            "node_rank and master_addr are for several nodes, and nodes is 1; give nodes=",
            name="nodes",
            got=nodes.nodes,
        )
    if nodes.nodes > 1 and nodes.executor != "ray" and not nodes.master_addr:
        raise WorkloadError(
            f"{nodes.nodes} nodes need master_addr=, the address of the first one that the others can connect to",
            name="master_addr",
            got=nodes.master_addr,
        )
    if type(nodes.node_rank) is not int or not 0 <= nodes.node_rank < max(nodes.nodes, 1):
        raise WorkloadError(
            f"node_rank must be from 0 to {nodes.nodes - 1}, one for each node, got {nodes.node_rank!r}",
            name="node_rank",
            got=nodes.node_rank,
        )


def _parallel(workers: Workers, nodes: Nodes) -> dict[str, Value]:
    """Return the options of several workers and several machines.

    Source: vLLM 0.33.0, vllm/config/parallel.py:290 to 328, vllm/entrypoints/cli/serve.py, run_headless.
    """
    options: dict[str, Value] = {
        "tensor-parallel-size": workers.tensor,
        "pipeline-parallel-size": workers.pipeline,
    }
    if workers.nodes > 1 and nodes.executor != "ray":
        options |= {"nnodes": workers.nodes, "node-rank": nodes.node_rank, "master-addr": nodes.master_addr or ""}
        options["distributed-executor-backend"] = "mp"
        if nodes.node_rank:
            options["headless"] = True
    elif nodes.executor is not None:
        options["distributed-executor-backend"] = nodes.executor
    return options


def _of_nodes(workers: Workers, *, on_cpu: bool) -> tuple[str, ...]:
    if workers.tensor * workers.pipeline == 1 or on_cpu:
        return ()
    return ("buffers of NCCL between GPUs are not counted: keep a reserve on each GPU",)


def _utilization(budget: Budget) -> float | None:
    """Return the budget's fraction of the GPU with the least; `None` if the plan is for GPUs that are not here.

    vLLM takes nothing by it beside `--kv-cache-memory-bytes`. But it refuses to start if this fraction of the GPU is
    not free, and its default is 0.92. Source: vLLM 0.33.0, vllm/v1/worker/utils.py:716, request_memory.
    """
    gpus = visible_gpus()
    sizes = budget.devices or {0: budget.vram or 0}
    if any(number >= len(gpus) for number in sizes):
        return None
    fraction = min(size / gpus[number].total for number, size in sizes.items())
    return max(0.01, min(1.0, int(fraction * 1000) / 1000))


def _visible(budget: Budget) -> dict[str, str]:
    """Return the variable that shows vLLM the plan's GPUs, if they are not the first ones."""
    numbers = list(budget.devices)
    if numbers == list(range(len(numbers))):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers))}


def _unbound(workers: Workers) -> dict[str, str]:
    """Return the variable without which vLLM refuses more workers than this machine has NUMA nodes.

    vLLM binds each worker to a node of its own. Source: vLLM 0.32.0, vllm/utils/ompmultiprocessing.py:216.
    """
    if workers.on_a_node <= numa_nodes():
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def _opened(model: str, label: str, *, own: bool) -> str:
    """Return the folder of a checkpoint as an absolute path, or its name on the hub."""
    place = place_of(model)
    if place.folder is not None:
        return str(place.folder.absolute())
    return label if own else place.name
