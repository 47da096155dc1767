"""cuBLAS workspaces, one for each thread and stream, which stay allocated.

Generations of all models compute in permanent threads (`runner`), so they share workspaces. This module notes the bytes
of a workspace, to distinguish them from the caller's tensors.
"""

from __future__ import annotations

import threading

import torch

# Bytes by thread, device and stream.
_TAKEN: dict[tuple[int, torch.device, int], int] = {}


def take_workspace(device: torch.device, *, of_sums: bool = False) -> None:
    """Make cuBLAS allocate its workspace for this thread and its stream on `device`, if it has not.

    Otherwise it would later take a part of other buffers, such as a compiler's measurement buffers of 256 MiB. These
    could then not be returned to the device.

    Args:
        of_sums: Also allocate cuBLASLt's workspace, for products with a bias.
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
    """Return the bytes of workspaces that the next model's generations reuse, with those of captured steps."""
    main = torch.cuda.default_stream(device).cuda_stream
    here = [(stream == main, nbytes) for (_, where, stream), nbytes in _TAKEN.items() if where == device]
    on_main = max((nbytes for is_main, nbytes in here if is_main), default=0)
    on_side = max((nbytes for is_main, nbytes in here if not is_main), default=0)
    return on_main + (on_side if captured else 0)
