"""CUDA streams on which decode steps are captured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# cuBLAS keeps a workspace for every stream until the process ends, so the streams of closed models are reused.
_FREE_STREAMS: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def take_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that no decoder has."""
    free = _FREE_STREAMS[device]
    return free.pop() if free else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def give_stream(stream: torch.cuda.Stream) -> None:
    """Take back the stream of a closed decoder."""
    _FREE_STREAMS[stream.device].append(stream)


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run on `stream`, after earlier work of the current stream and before its later work."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
