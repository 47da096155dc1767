"""The location of each module of a plan, by the module's name in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.gpu_split import split_of
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.residency import Home, residency

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


def streaming(profile: Profile, count: int) -> Profile:
    """Return `profile` with `count` layers off the device, and at most `count` of them on the disk or computing."""
    disk = min(profile.disk_layers, count)
    return profile.replace(streamed_layers=count, disk_layers=disk, host_layers=min(profile.host_layers, count - disk))
