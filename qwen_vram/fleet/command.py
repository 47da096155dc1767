"""The command of each server of a fleet, with the options of its engine."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from qwen_vram.checkpoints.files.place import place_of
from qwen_vram.errors import NotSupportedError, WorkloadError
from qwen_vram.fleet.card_memory import served
from qwen_vram.fleet.data import Fleet, FleetOption
from qwen_vram.fleet.engines import ENGINES, Engine, profile_of
from qwen_vram.planning.vllm.formats import vllm_dtype
from qwen_vram.spec.cards.find import find_gpu

PORT = 8000
# Format -> `--quantization` of `transformers serve`. Source: transformers 5.23.0, cli/serve.py.
_TRANSFORMERS_ONLINE = {"nf4": "bnb-4bit", "int8": "bnb-8bit"}


class ServerCommand(NamedTuple):
    """The command of one server.

    Attributes:
        replica: Its number in the fleet.
        node: The number of its machine.
        gpus: The numbers of its GPUs on that machine.
        port: Its port on that machine.
        arguments: The command.
    """

    replica: int
    node: int
    gpus: tuple[int, ...]
    port: int
    arguments: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """The variable that shows the server its GPUs only."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}

    def __str__(self) -> str:
        """One line, quoted for a shell."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"{variables} {shlex.join(self.arguments)}"


def commands(plan: Fleet, option: FleetOption) -> list[ServerCommand]:
    """Return the command of each server. Servers fill one machine after the other.

    Raises:
        NotSupportedError: there is no checkpoint that the engine could open in this format.
    """
    on_a_node = plan.gpus_per_node // option.tensor_parallel
    servers = []
    for replica in range(option.replicas):
        node, place = divmod(replica, on_a_node)
        first = place * option.tensor_parallel
        gpus = tuple(range(first, first + option.tensor_parallel))
        arguments = server_arguments(plan, option, opened(plan), host="127.0.0.1", port=PORT + place)
        servers.append(ServerCommand(replica, node, gpus, PORT + place, tuple(arguments)))
    return servers


def opened(plan: Fleet) -> str:
    """Return the name of the model that a server opens: an absolute folder, or a hub id.

    Raises:
        NotSupportedError: the plan is of a config, which has no weights.
    """
    if plan.model is None:
        raise NotSupportedError(
            "a server opens a checkpoint, and this plan is of a config; plan with a folder, a catalog name or a hub id",
            knob="model",
            value=None,
        )
    place = place_of(plan.model)
    return str(place.folder.absolute()) if place.folder is not None else plan.label


def server_arguments(plan: Fleet, option: FleetOption, model: str, *, host: str, port: int) -> list[str]:
    """Return the command of one server: the only place that knows the options of the engines."""
    if option.weights in plan.engine.exports:
        raise NotSupportedError(
            f"{option.weights} weights are an export: write it with qv.quantize_gptq({model!r}, 'OUT', ...), and plan "
            "with that folder",
            knob="weights",
            value=option.weights,
        )
    of = {"vllm": _vllm, "transformers": _transformers}[plan.engine.name]
    options = {**of(plan, option), "host": host, "port": port}
    name = "vllm" if plan.engine.divides else "transformers"
    words = [name, "serve", model]
    for key, value in options.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def _vllm(plan: Fleet, option: FleetOption) -> dict[str, str | int | bool]:
    architecture = plan.question.architecture
    profile = profile_of(plan.engine, option.weights, architecture, option.limits.step_tokens)
    weights = served(architecture, profile)
    options: dict[str, str | int | bool] = {
        "served-model-name": plan.label,
        "dtype": _dtype(plan, option),
        "max-model-len": sum(plan.question.longest),
        "max-num-seqs": option.limits.sequences,
        "max-num-batched-tokens": option.limits.step_tokens,
        "kv-cache-memory-bytes": option.memory.kv_cache,
        "tensor-parallel-size": option.tensor_parallel,
    }
    if weights.quantization is not None:
        options["quantization"] = weights.quantization
    return options


def _transformers(plan: Fleet, option: FleetOption) -> dict[str, str | int | bool]:
    options: dict[str, str | int | bool] = {
        "continuous-batching": True,
        "dtype": _dtype(plan, option),
        "cb-block-size": option.limits.block_tokens,
        "cb-num-blocks": option.limits.blocks + plan.engine.spare_blocks,
        "cb-max-batch-tokens": option.limits.step_tokens,
    }
    if option.weights in _TRANSFORMERS_ONLINE:
        options["quantization"] = _TRANSFORMERS_ONLINE[option.weights]
    return options


def _dtype(plan: Fleet, option: FleetOption) -> str:
    """Return torch's name of the dtype of activations; a card without bf16 has fp16."""
    profile = profile_of(plan.engine, option.weights, plan.question.architecture, option.limits.step_tokens)
    return vllm_dtype(profile, old_gpu=not find_gpu(option.gpu).has_bf16)


def check_vllm(engine: Engine) -> None:
    """Refuse another engine.

    Raises:
        NotSupportedError: the engine is not vLLM.
    """
    if engine is not ENGINES["vllm"]:
        raise NotSupportedError(
            f"the plan is for engine {engine.name!r}; plan with engine='vllm', or use commands()",
            knob="engine",
            value=engine.name,
        )


def check_node(plan: Fleet, option: FleetOption, node: int) -> list[ServerCommand]:
    """Return the servers of one machine.

    Raises:
        WorkloadError: the option has no such machine.
    """
    servers = [server for server in commands(plan, option) if server.node == node]
    if not servers:
        nodes = -(-option.replicas // (plan.gpus_per_node // option.tensor_parallel))
        raise WorkloadError(f"node must be from 0 to {nodes - 1}, got {node!r}", name="node", got=node)
    return servers
