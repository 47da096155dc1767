"""The location of each module of a plan, by the module's name in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.gpu_split import split_of
from qwen_vram.checkpoints.adapters.folder import AdapterChoice
from qwen_vram.checkpoints.machine_file import current
from qwen_vram.checkpoints.resolve import ModelLike, resolve_model, stored_knobs
from qwen_vram.errors import WorkloadError
from qwen_vram.planning.capacity.budget import Budget, VramLike
from qwen_vram.planning.capacity.fit import fits, on_device
from qwen_vram.planning.capacity.refusal import shortage
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.planning.search.search import Search
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile, resolve_profile
from qwen_vram.spec.residency import Home, residency
from qwen_vram.spec.workload import Workload
from qwen_vram.units import parse_bytes

Where = int | Literal["cpu", "disk"]
Tier = Literal["device", "stream", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The location of each part of a model: a device, the host, or the disk.

    Attributes:
        embeddings: The token embeddings.
        layers: One entry for each decoder layer.
        rotary: The rotary tables.
        norm: The last norm.
        head: The head.
        computing: Numbers of the layers on the host that compute there in decode steps.
    """

    embeddings: Where
    layers: tuple[Where, ...]
    rotary: Where
    norm: Where
    head: Where
    computing: frozenset[int] = frozenset()

    @property
    def device_map(self) -> dict[str, Where]:
        """The same as a `device_map` for `transformers` and accelerate: every module by its own name."""
        layers = {f"model.layers.{index}": where for index, where in enumerate(self.layers)}
        return {
            "model.embed_tokens": self.embeddings,
            **layers,
            "model.norm": self.norm,
            "model.rotary_emb": self.rotary,
            "lm_head": self.head,
        }

    @property
    def tiers(self) -> dict[str, Tier]:
        """The tier of each module: resident on a device, streamed to it from host or disk, or computing on the host."""
        return {name: self._tier(name, where) for name, where in self.device_map.items()}

    def _tier(self, name: str, where: Where) -> Tier:
        if where == "disk":
            return "disk"
        if where != "cpu":
            return "device"
        streams = name.startswith("model.layers.") and self.norm != "cpu"
        return "stream" if streams and int(name.rpartition(".")[2]) not in self.computing else "host"


def place(architecture: Architecture, profile: Profile, *, device: Where = 0) -> Placement:
    """Return the location of each module in `profile`: `device`, the host or the disk."""
    homes = residency(architecture, profile)
    where: dict[Home, Where] = {"device": device, "host": "cpu", "computing": "cpu", "disk": "disk"}
    return Placement(
        embeddings="cpu" if homes.table_on_host else device,
        layers=tuple(where[home] for home in homes.layers),
        rotary=device,
        norm=device,
        head=device,
        computing=homes.computing,
    )


def place_split(architecture: Architecture, profile: Profile, counts: Mapping[int, int]) -> Placement:
    """Return the location of each module with `counts` layers on each of several GPUs, in order.

    A token passes through the GPUs from the first to the last. A head that is tied to the token embeddings is on the
    same GPU as they are.
    """
    first, *_, last = counts
    return Placement(
        embeddings="cpu" if residency(architecture, profile).table_on_host else first,
        layers=tuple(device for device, count in counts.items() for _ in range(count)),
        rotary=first,
        norm=last,
        head=first if architecture.tie_word_embeddings else last,
    )


def place_on(budget: Budget, result: Estimate) -> Placement:
    """Return the location of an estimate's modules: devices of its budget, or the host if there is no GPU."""
    assert result.architecture is not None
    if result.devices:
        return place_split(result.architecture, result.profile, split_of(result))
    device: Where = "cpu" if budget.vram is None else next(iter(budget.devices), 0)
    return place(result.architecture, result.profile, device=device)


def _streaming(profile: Profile, count: int) -> Profile:
    """`profile` with `count` layers off the device, and at most `count` of them on the disk or computing."""
    disk = min(profile.disk_layers, count)
    return profile.replace(streamed_layers=count, disk_layers=disk, host_layers=min(profile.host_layers, count - disk))


def offload_map(
    model: ModelLike,
    *,
    vram: VramLike = None,
    ram: str | int | None = None,
    reserve: str | int | None = None,
    layers_on_cpu: int | None = None,
    profile: str | Profile = "default",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> dict[str, Where]:
    """Make a `device_map` that leaves memory for cache and activations, with the fewest bytes on the host.

    The token embeddings are moved to the host first (rows can be gathered there), then decoder layers, spread evenly.
    Slots on the device are counted for streamed layers. Tied embeddings stay on the device, because the head needs
    them, unless the head is a copy (`lm_head`). Layers that do not fit on the host are "disk": in the checkpoint's
    files.

    Args:
        model: As for `estimate_vram`.
        vram: The most bytes that nvidia-smi may show; `None` is the memory that is free now. With several GPUs (a dict
            by number) every layer stays on one of them.
        reserve: As for `plan`.
        ram: The same for the host; `None` is the memory that is available now.
        layers_on_cpu: The number of layers on the host, for any budget; the token embeddings stay on the device. The
            article's third row is `layers_on_cpu=3`. The budget is then checked only if `vram` or `reserve` is given.
        profile: The profile whose weights, cache and attention are counted.
        padded, adapter: As for `plan`.

    Raises:
        DoesNotFitError: not even all layers on the host fit the budget.
        NotSupportedError: layers on the host and several GPUs.
        WorkloadError: a length out of range, or more layers than the model has.
        UnknownNameError, UnitError, ConfigError: as for `estimate_vram`.

    Example:
        >>> where = offload_map("Qwen2.5-7B-Instruct", layers_on_cpu=3)
        >>> [name for name, device in where.items() if device == "cpu"]
        ['model.layers.8', 'model.layers.17', 'model.layers.27']
    """
    label, architecture = resolve_model(model, adapter)
    chosen = resolve_profile(profile, **stored_knobs(architecture, knobs))
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size, padded=padded)
    layers = architecture.num_hidden_layers
    if layers_on_cpu is not None:
        if isinstance(layers_on_cpu, bool) or not isinstance(layers_on_cpu, int) or not 0 <= layers_on_cpu <= layers:
            raise WorkloadError(
                f"layers_on_cpu must be between 0 and the model's num_hidden_layers {layers}, got {layers_on_cpu!r}",
                name="layers_on_cpu",
                got=layers_on_cpu,
            )
        tried = [_streaming(chosen, layers_on_cpu)]
        if vram is None and reserve is None:
            if ram is not None:
                parse_bytes(ram, name="ram")
            return place(architecture, tried[0]).device_map
    else:
        on_host = chosen.replace(embeddings="host")
        tried = [chosen, on_host, *(_streaming(on_host, count) for count in range(1, layers + 1))]
    budget = Budget.of(vram, ram, reserve)
    if budget.vram is None:
        return place(architecture, chosen, device="cpu").device_map
    search = Search(label, architecture, workload, budget, chosen, {}, machine=current())
    search.tiers.may_read = "disk_layers" not in knobs
    if search.several and layers_on_cpu is None:
        tried = tried[:2]
    for candidate in tried:
        result = search.estimate(candidate, workload)
        if on_device(result, budget):
            result = search.tiers.fewest_on_disk(result)
        if fits(result, budget):
            return place_on(budget, result).device_map
    short = shortage(result, budget)
    raise DoesNotFitError(
        f"{label} with {result.profile.streamed_layers} of {layers} layers on the host needs {short.needs}; "
        f"{short.allowed} are allowed; use weights='nf4', a prefill_chunk_size, or a shorter context",
        needed_bytes=short.needed_bytes,
        budget_bytes=short.budget_bytes,
        estimate=result,
        nearest=None,
        devices=short.devices,
    )
