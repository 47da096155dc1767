"""Buffers that a thread reuses for every piece of a merge.

Fresh pages cost more than the arithmetic that fills them.

Measured: torch 2.13 and glibc on a virtual machine, pieces of 8 MiB: page faults took half of a merge's time.
"""

from __future__ import annotations

import math
import threading

import torch

_CPU = torch.device("cpu")


class _Buffers(threading.local):
    """Buffers of the calling thread."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[str, torch.device], torch.Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = _CPU) -> torch.Tensor:
    """Return this thread's buffer called `name` as an uninitialized tensor of `shape`.

    It is valid until the next call for the same name. The buffers are freed when the thread ends.
    """
    buffers = _buffers.by_key
    key = (name, device)
    nbytes = math.prod(shape) * dtype.itemsize
    if key not in buffers or buffers[key].numel() < nbytes:
        buffers[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return buffers[key][:nbytes].view(dtype).view(shape)
