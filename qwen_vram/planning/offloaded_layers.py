"""Which decoder layers are not resident, and where these stay: numbers, spread evenly."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile


def spread(streamed: int, layers: int) -> frozenset[int]:
    """`streamed` of `layers` indices, as evenly as they go, so that each has resident layers to hide behind.

    >>> sorted(spread(3, 28))
    [8, 17, 27]
    """
    return frozenset((index + 1) * layers // streamed - 1 for index in range(streamed))


def among(layers: int, streamed: Collection[int]) -> frozenset[int]:
    """`layers` of the streamed ones, as evenly among them as they go.

    >>> sorted(among(2, {3, 7, 11, 15}))
    [7, 15]
    """
    ordered = sorted(streamed)
    return frozenset(ordered[index] for index in spread(layers, len(ordered))) if layers else frozenset()


class OffloadedLayers(NamedTuple):
    """Numbers of the layers that are not resident, and of those among them on the disk and computing on the host."""

    streamed: frozenset[int]
    disk: frozenset[int]
    computing: frozenset[int]


def offloaded_layers(architecture: Architecture, profile: Profile) -> OffloadedLayers:
    """Which layers `profile` has stream, and how."""
    count = profile.streamed_layers
    streamed = spread(count, architecture.num_hidden_layers) if count else frozenset()
    disk = among(profile.disk_layers, streamed)
    return OffloadedLayers(streamed, disk, among(profile.host_layers, streamed - disk))
