"""Torch's memory on a model's devices that belongs to others.

torch reports one number for a process. Bytes allocated before the model was loaded belong to others, and so do changes
between its generations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from qwen_vram.runtime.memory.workspaces import take_workspace


class Beside:
    """The bytes beside a model, by its devices on CUDA; zero on other devices.

    Args:
        before: Bytes allocated on each device before the model was loaded, without workspaces that it reuses.
    """

    def __init__(self, before: Mapping[torch.device, int]) -> None:
        self._bytes = {device: nbytes for device, nbytes in before.items() if device.type == "cuda"}
        self._at_rest = {device: torch.cuda.memory_allocated(device) for device in self._bytes}

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The model's devices on CUDA."""
        return tuple(self._at_rest)

    def nbytes(self, device: torch.device) -> int:
        """Return the bytes on a device when the last generation began."""
        return max(0, self._bytes.get(device, 0))

    def begin(self) -> None:
        """Note the beginning of a generation in this thread: changes since the last one are not the model's."""
        for device, at_rest in self._at_rest.items():
            self._bytes[device] += torch.cuda.memory_allocated(device) - at_rest
            take_workspace(device)

    def end(self) -> None:
        """Note the end of a generation, whose tensors are freed."""
        self._at_rest = {device: torch.cuda.memory_allocated(device) for device in self._at_rest}

    @contextmanager
    def freeing(self) -> Iterator[None]:
        """Run code between generations that frees memory of the model, so that the change does not count."""
        before = {device: torch.cuda.memory_allocated(device) for device in self._at_rest}
        yield
        for device, nbytes in before.items():
            self._at_rest[device] -= nbytes - torch.cuda.memory_allocated(device)

    def lost(self, nbytes: Mapping[torch.device, int]) -> None:
        """Note bytes of the model that a generation freed, which ends with an error."""
        for device in self._at_rest:
            self._at_rest[device] -= nbytes.get(device, 0)
