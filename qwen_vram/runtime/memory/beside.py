"""Torch's memory on a model's devices that belongs to others.

torch reports one number for a process. Bytes allocated before the model was loaded belong to others, and so do changes
between its generations.
"""

from __future__ import annotations

from collections.abc import Mapping

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
