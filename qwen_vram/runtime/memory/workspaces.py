"""cuBLAS's workspaces: one for each thread and stream that multiplies, allocated until the process ends.

Generations of all models compute in threads that stay (`runner`), so that they share workspaces. What a workspace takes
is noted here, to tell it from the caller's tensors.
"""

from __future__ import annotations

import threading

import torch

# Bytes by thread, device and stream.
_TAKEN: dict[tuple[int, torch.device, int], int] = {}


def take_workspace(device: torch.device, *, of_sums: bool = False) -> None:
    """Have cuBLAS take its workspace for this thread and its stream on `device`, if it has not.

    Later it would be cut from buffers of other use, such as a compiler's measurements of 256 MiB each, which could
    then not be returned to the device.

    Args:
        of_sums: cuBLASLt's workspace too, for products with a bias.
    """
    key = (threading.get_ident(), device, torch.cuda.current_stream(device).cuda_stream)
    if key in _TAKEN:
        return
    square = torch.zeros(16, 16, device=device)
    before = torch.cuda.memory_allocated(device)
    product = torch.mm(square, square)
    if of_sums:
        torch.addmm(square[0], square, square)
    _TAKEN[key] = torch.cuda.memory_allocated(device) - before - product.untyped_storage().nbytes()


def reused_bytes(device: torch.device, *, captured: bool) -> int:
    """Return the bytes of workspaces that the next model's generations find there, and its captured steps too."""
    main = torch.cuda.default_stream(device).cuda_stream
    here = [(stream == main, nbytes) for (_, where, stream), nbytes in _TAKEN.items() if where == device]
    on_main = max((nbytes for is_main, nbytes in here if is_main), default=0)
    on_side = max((nbytes for is_main, nbytes in here if not is_main), default=0)
    return on_main + (on_side if captured else 0)
