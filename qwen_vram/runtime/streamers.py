"""Several streamers of tokens where `generate` takes one."""

from __future__ import annotations

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Streamers(BaseStreamer):  # type: ignore[misc]
    """Hands each token to several streamers, in their order."""

    def __init__(self, *streamers: BaseStreamer) -> None:
        self._streamers = streamers

    def put(self, value: Tensor) -> None:
        """Pass on tokens."""
        for streamer in self._streamers:
            streamer.put(value)

    def end(self) -> None:
        """Pass on the end."""
        for streamer in self._streamers:
            streamer.end()
