"""Memory of torch on a model's devices that is not the model's: the caller's tensors, and other models'.

torch tells one number for a process. Not the model's is what was there before it was loaded, and what comes and goes
between its generations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwen_vram.runtime.memory.workspaces import take_workspace


class Beside:
    """The bytes beside a model, by its devices on CUDA; nothing on others.

    Args:
        before: What was allocated on each device before the model was loaded, without workspaces that it uses again.
    """

    def __init__(self, before: Mapping[torch.device, int]) -> None:
        self._bytes = {device: nbytes for device, nbytes in before.items() if device.type == "cuda"}
        self._at_rest = {device: torch.cuda.memory_allocated(device) for device in self._bytes}

    def nbytes(self, device: torch.device) -> int:
        """Return the bytes on a device when the last generation began."""
        return max(0, self._bytes.get(device, 0))

    def begin(self) -> None:
        """A generation begins, in this thread: what came or went since the last one is not the model's."""
        for device, at_rest in self._at_rest.items():
            self._bytes[device] += torch.cuda.memory_allocated(device) - at_rest
            take_workspace(device)

    def end(self) -> None:
        """A generation has ended, and its tensors are gone."""
        self._at_rest = {device: torch.cuda.memory_allocated(device) for device in self._at_rest}
