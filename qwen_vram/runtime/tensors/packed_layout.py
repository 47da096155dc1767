"""Layout of a block of weights in one piece of memory, for one copy."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Hashable, Mapping
from contextlib import suppress
from math import prod
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_LOGGER = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)


class _Place(NamedTuple):
    offset: int
    dtype: torch.dtype
    shape: torch.Size


class Layout(Generic[Key]):
    """The positions of some tensors in one piece of memory of exactly their bytes.

    Sizes with more factors of two come first. Each tensor then starts at a multiple of the largest power of two that
    divides its size, without gaps. Matrices of Qwen's shapes keep an alignment of 256 bytes or more, on which cuBLAS
    bases its choice of kernels. bitsandbytes reads block maxima one by one.
    """

    def __init__(self, tensors: Mapping[Key, Tensor]) -> None:
        self.places: dict[Key, _Place] = {}
        self.nbytes = 0
        for key, tensor in sorted(tensors.items(), key=lambda item: item[1].nbytes & -item[1].nbytes, reverse=True):
            self.places[key] = _Place(self.nbytes, tensor.dtype, tensor.shape)
            self.nbytes += tensor.nbytes

    def views(self, memory: Tensor) -> dict[Key, Tensor]:
        """Return the tensors as views of `memory`, bytes on any device."""
        return {
            key: memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for key, (offset, dtype, shape) in self.places.items()
        }


class HostMemory:
    """Host memory for blocks, pinned for copies to a GPU until `give_back()`, or until this object is freed.

    Pages are registered with the driver one block at a time. torch's own pinned memory would round each block up to a
    power of two, and cache it. If the system allows no more, one warning says so, and the rest stays ordinary memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self._locked: list[Tensor] = []
        self.give_back = weakref.finalize(self, _unlock, self._locked, device)
        self.give_back.atexit = False  # the end of the process frees everything

    def take(self, nbytes: int) -> Tensor:
        """Return `nbytes` bytes of host memory."""
        if not self.pinned:
            return torch.empty(nbytes, dtype=torch.uint8)
        # A separate mapping for each block: whole pages, which no other memory shares.
        whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = torch.frombuffer(_map(whole), dtype=torch.uint8)
        status = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), whole, 0))  # type: ignore[no-untyped-call]
        if status == 0:
            self._locked.append(pages)
        else:
            self.pinned = False
            with suppress(RuntimeError):  # otherwise the next kernel would report this error
                torch.ones(1, device=self.device)
            text = "streamed layers stay in unpinned host memory, from which copies are slower: CUDA error %d"
            _LOGGER.warning(text, status)
        return pages[:nbytes]


def _map(nbytes: int) -> mmap.mmap:
    """Return private memory of this process, from the system."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def _unlock(locked: list[Tensor], device: torch.device) -> None:
    if locked:
        torch.cuda.synchronize(device)  # copies may still read
    while locked:
        torch.cuda.cudart().cudaHostUnregister(locked.pop().data_ptr())  # type: ignore[no-untyped-call]
