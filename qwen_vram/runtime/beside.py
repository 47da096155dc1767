"""What torch has allocated on a model's devices that is not the model's: the caller's tensors, and other models'.

torch tells one number for a process. A caller's tensors are what was there before the model was loaded, and what comes
and goes between its generations.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

# The bytes of cuBLAS's workspaces by thread, device and stream. They stay allocated with their thread.
_WORKSPACES: dict[tuple[int, torch.device, int], int] = {}


class Beside:
    """The bytes beside a model, by its devices on CUDA; nothing on others.

    Args:
        before: What was allocated on each device before the model was loaded, cuBLAS's workspace included.
    """

    def __init__(self, before: Mapping[torch.device, int]) -> None:
        before = {device: nbytes for device, nbytes in before.items() if device.type == "cuda"}
        self._bytes = {device: nbytes - _workspace_of_runners(device) for device, nbytes in before.items()}
        self._at_rest = {device: torch.cuda.memory_allocated(device) for device in before}

    def nbytes(self, device: torch.device) -> int:
        """Return the bytes on a device when the last generation began."""
        return max(0, self._bytes.get(device, 0))

    def begin(self) -> None:
        """A generation begins, in this thread: what came or went since the last one is not the model's."""
        for device, at_rest in self._at_rest.items():
            self._bytes[device] += torch.cuda.memory_allocated(device) - at_rest
            _take_workspace(device)

    def end(self) -> None:
        """A generation has ended, and its tensors are gone."""
        self._at_rest = {device: torch.cuda.memory_allocated(device) for device in self._at_rest}


def _workspace_of_runners(device: torch.device) -> int:
    """Return the bytes of the largest workspace of a thread that generates: the next model uses it again."""
    return max((nbytes for (_, where, _), nbytes in _WORKSPACES.items() if where == device), default=0)


def _take_workspace(device: torch.device) -> None:
    """Have cuBLAS take its workspace for this thread and its stream, if it has not."""
    key = (threading.get_ident(), device, torch.cuda.current_stream(device).cuda_stream)
    if key in _WORKSPACES:
        return
    square = torch.ones(16, 16, device=device)
    before = torch.cuda.memory_allocated(device)
    product = square @ square
    _WORKSPACES[key] = torch.cuda.memory_allocated(device) - before - product.untyped_storage().nbytes()
