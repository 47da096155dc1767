"""Measured rates of copies from host memory to the GPU, pinned and not."""

from __future__ import annotations

import time

import torch

_COPIED = 2**27


def rates() -> tuple[float | None, float | None]:
    """Return bytes a second from pinned and from other host memory to the current GPU; `None` without a GPU."""
    if not torch.cuda.is_available():
        return None, None
    return _rate(pinned=True), _rate(pinned=False)


def _rate(*, pinned: bool) -> float:
    source = torch.ones(_COPIED, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(_COPIED, dtype=torch.uint8, device="cuda")
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return _COPIED / best
