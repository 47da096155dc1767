"""Location of each decoder layer, the embeddings and the head, by a profile."""

from collections.abc import Collection
from functools import lru_cache
from typing import Literal, NamedTuple

from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile

Home = Literal["device", "host", "computing", "disk"]


def spread(streamed: int, layers: int) -> frozenset[int]:
    """Return `streamed` of `layers` indices, spread evenly, so that each one is copied while resident layers compute.

    >>> sorted(spread(3, 28))
    [8, 17, 27]
    """
    return frozenset((index + 1) * layers // streamed - 1 for index in range(streamed))


def among(layers: int, streamed: Collection[int]) -> frozenset[int]:
    """Return `layers` of the streamed indices, spread evenly among them.

    >>> sorted(among(2, {3, 7, 11, 15}))
    [7, 15]
    """
    ordered = sorted(streamed)
    return frozenset(ordered[index] for index in spread(layers, len(ordered))) if layers else frozenset()


class Residency(NamedTuple):
    """The location of each part of a model by a profile; the model may be one device's part of a larger one.

    Attributes:
        layers: The location of each decoder layer. `"device"` is resident. Layers of `"host"` and `"disk"` stream from
            there through slots on the device. Those of `"computing"` are on the host and compute there in decode steps.
        streamed: Numbers of the layers that are not resident.
        disk: Numbers of the layers that stay in the checkpoint's files.
        computing: Numbers of the layers that compute on the CPU in decode steps.
        table_on_host: The token embeddings are in host memory. They are not if a tied head needs them on the device.
        own_head: A tied head is quantized into a separate tensor, so that only the lookup needs the token embeddings.
        late_head: The head is quantized tile by tile after the resident layers are loaded, because layers stream.
    """

    layers: tuple[Home, ...]
    streamed: frozenset[int]
    disk: frozenset[int]
    computing: frozenset[int]
    table_on_host: bool
    own_head: bool
    late_head: bool

    @property
    def resident(self) -> int:
        """The number of layers that stay on the device."""
        return len(self.layers) - len(self.streamed)


@lru_cache(maxsize=4096)
def residency(architecture: Architecture, profile: Profile) -> Residency:
    """Return the location of each part of a model in `profile`."""
    count = min(profile.streamed_layers, architecture.num_hidden_layers)
    streamed = spread(count, architecture.num_hidden_layers) if count else frozenset()
    disk = among(min(profile.disk_layers, count), streamed)
    computing = among(min(profile.host_layers, count - len(disk)), streamed - disk)
    homes: list[Home] = ["device"] * architecture.num_hidden_layers
    for number in streamed:
        homes[number] = "disk" if number in disk else "computing" if number in computing else "host"
    tied = architecture.tie_word_embeddings
    own_head = tied and profile.head_format != profile.dtype
    return Residency(
        layers=tuple(homes),
        streamed=streamed,
        disk=disk,
        computing=computing,
        table_on_host=profile.embeddings == "host" and (own_head or not tied),
        own_head=own_head,
        late_head=count > 0 and profile.head_format != profile.dtype and architecture.stored_format is None,
    )
