"""The data of a fleet plan: the options that fulfil the wish, the best first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_vram.fleet.card_memory import CardMemory
from qwen_vram.fleet.engines import Engine
from qwen_vram.fleet.question import Question
from qwen_vram.fleet.replica import Replica
from qwen_vram.fleet.simulation.service import Service
from qwen_vram.fleet.simulation.simulate import Limits


@dataclass(frozen=True, kw_only=True)
class FleetOption:
    """A fleet that fulfils the wish.

    Attributes:
        gpu: The name of the card.
        weights: The format of the weights.
        tensor_parallel: GPUs of one replica, which share every layer.
        replicas: Servers that each have the whole model.
        limits: Blocks of a replica's KV cache, sequences at once, and tokens of a step.
        longest_sequences: Requests of the longest lengths that a replica's cache holds at once.
        memory: Bytes of each card by part.
        service: What the simulation measured.
        price_per_hour: The price of all GPUs for an hour; `None` without prices.
    """

    gpu: str
    weights: str
    tensor_parallel: int
    replicas: int
    limits: Limits
    longest_sequences: int
    memory: CardMemory
    service: Service
    price_per_hour: float | None

    @classmethod
    def of(cls, replica: Replica, replicas: int, service: Service, price: float | None) -> FleetOption:
        """Return the option of a number of replicas."""
        return cls(
            gpu=replica.gpu.name,
            weights=replica.weights,
            tensor_parallel=replica.size,
            replicas=replicas,
            limits=replica.limits,
            longest_sequences=min(replica.limits.sequences, replica.limits.blocks // replica.longest_blocks),
            memory=replica.memory,
            service=service,
            price_per_hour=None if price is None else price * replicas * replica.size,
        )

    @property
    def gpus(self) -> int:
        """The number of GPUs of the fleet."""
        return self.replicas * self.tensor_parallel

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`; sizes in bytes."""
        return {
            "gpu": self.gpu,
            "gpus": self.gpus,
            "weights": self.weights,
            "tensor_parallel": self.tensor_parallel,
            "replicas": self.replicas,
            "sequences": self.limits.sequences,
            "longest_sequences": self.longest_sequences,
            "kv_blocks": self.limits.blocks,
            "kv_block_tokens": self.limits.block_tokens,
            "step_tokens": self.limits.step_tokens,
            "memory": self.memory._asdict(),
            "service": self.service.to_dict(),
            "price_per_hour": self.price_per_hour,
        }


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The options for a number of users, the best first.

    Attributes:
        model: The model as the caller named it; `None` for a config or an `Architecture`.
        label: Its name in texts.
        engine: The engine of every server.
        question: The users, their lengths and their wish.
        gpus_per_node: GPUs of one machine.
        options: The best division of each card and format that fulfils the wish: by price if prices are given, then by
            the number of GPUs.
        notes: What was left out, and why.
    """

    model: str | None
    label: str
    engine: Engine
    question: Question
    gpus_per_node: int
    options: tuple[FleetOption, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> FleetOption:
        """The first option."""
        return self.options[0]

    @property
    def alternatives(self) -> tuple[FleetOption, ...]:
        """The other options."""
        return self.options[1:]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`; sizes in bytes."""
        return {
            "model": self.label,
            "engine": self.engine.name,
            "asked": self.question.to_dict(),
            "gpus_per_node": self.gpus_per_node,
            "best": self.best.to_dict(),
            "alternatives": [option.to_dict() for option in self.alternatives],
            "notes": list(self.notes),
        }
