"""Placement: which module lives where, under the names that the model's modules really have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.estimate import estimate
from qwen_vram.arithmetic.model import ModelLike, resolve_model, stored_knobs
from qwen_vram.arithmetic.profile import Profile, resolve_profile
from qwen_vram.arithmetic.weights import table_on_host
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.errors import DoesNotFitError, WorkloadError
from qwen_vram.planning.budget import Budget, VramLike
from qwen_vram.units import format_gib

Where = int | Literal["cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where each part of a model lives: on the device, or on the host.

    Attributes:
        embeddings: The token table.
        layers: One entry for each decoder layer.
        rest: Last norm, rotary tables and head.
    """

    embeddings: Where
    layers: tuple[Where, ...]
    rest: Where

    @property
    def device_map(self) -> dict[str, Where]:
        """The same as a `device_map` for `transformers` and accelerate: every module, under its own name."""
        layers = {f"model.layers.{index}": where for index, where in enumerate(self.layers)}
        return {
            "model.embed_tokens": self.embeddings,
            **layers,
            "model.norm": self.rest,
            "model.rotary_emb": self.rest,
            "lm_head": self.rest,
        }


def spread(streamed: int, layers: int) -> frozenset[int]:
    """`streamed` of `layers` indices, as evenly as they go, so that each has resident layers to hide behind.

    >>> sorted(spread(3, 28))
    [8, 17, 27]
    """
    return frozenset((index + 1) * layers // streamed - 1 for index in range(streamed))


def place(architecture: Architecture, profile: Profile, *, device: Where = 0) -> Placement:
    """Where `profile` puts each module, on `device` or on the host."""
    on_host = spread(profile.streamed_layers, architecture.num_hidden_layers) if profile.streamed_layers else ()
    layers = tuple("cpu" if index in on_host else device for index in range(architecture.num_hidden_layers))
    table: Where = "cpu" if table_on_host(architecture, profile) else device
    return Placement(embeddings=table, layers=layers, rest=device)


def offload_map(
    model: ModelLike,
    *,
    vram: VramLike = None,
    ram: str | int | None = None,
    layers_on_cpu: int | None = None,
    profile: str | Profile = "default",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    **knobs: object,
) -> dict[str, Where]:
    """A `device_map` that leaves room for cache and activations, with as little on the host as the budget allows.

    The token table goes first (rows can be gathered on the host), then decoder layers, spread evenly. Two slots on the
    device are counted for layers that pass through. A tied table stays, because the head needs it, unless the head is a
    copy (`lm_head`).

    Args:
        model: As for `estimate_vram`.
        vram: The most that nvidia-smi may show; `None` is what is free now.
        layers_on_cpu: This many layers go to the host whatever fits, and the table stays: the article's third row is
            `layers_on_cpu=3`. The budget is then checked where `vram` is given.
        profile: The profile whose weights, cache and attention are counted.

    Raises:
        DoesNotFitError: not even all layers on the host fit the budget.
        WorkloadError: a length out of range, or more layers than there are.
        UnknownNameError, UnitError, ConfigError: as for `estimate_vram`.

    Example:
        >>> where = offload_map("Qwen2.5-7B-Instruct", layers_on_cpu=3)
        >>> [name for name, device in where.items() if device == "cpu"]
        ['model.layers.8', 'model.layers.17', 'model.layers.27']
    """
    label, architecture = resolve_model(model)
    chosen = resolve_profile(profile, **stored_knobs(architecture, knobs))
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size)
    layers = architecture.num_hidden_layers
    if layers_on_cpu is not None:
        if isinstance(layers_on_cpu, bool) or not isinstance(layers_on_cpu, int) or not 0 <= layers_on_cpu <= layers:
            raise WorkloadError(
                f"layers_on_cpu must be between 0 and the model's num_hidden_layers {layers}, got {layers_on_cpu!r}",
                name="layers_on_cpu",
                got=layers_on_cpu,
            )
        tried = [chosen.replace(streamed_layers=layers_on_cpu)]
        if vram is None:
            return place(architecture, tried[0]).device_map
    else:
        on_host = chosen.replace(embeddings="host")
        tried = [chosen, on_host, *(on_host.replace(streamed_layers=count) for count in range(1, layers + 1))]
    budget = Budget.of(vram, ram)
    if budget.vram is None:
        return place(architecture, chosen, device="cpu").device_map
    for candidate in tried:
        result = estimate(label, architecture, candidate, workload)
        if result.needed_bytes <= budget.vram and result.host <= budget.ram:
            return place(architecture, candidate).device_map
    raise DoesNotFitError(
        f"{label} needs {format_gib(result.needed_bytes)} on the device and {format_gib(result.host)} on the host with "
        f"{tried[-1].streamed_layers} of {layers} layers there; {format_gib(budget.vram)} and "
        f"{format_gib(budget.ram)} are allowed; use weights='nf4', a prefill_chunk_size, or a shorter context",
        needed_bytes=result.needed_bytes,
        budget_bytes=budget.vram,
        estimate=result,
        nearest=None,
    )
