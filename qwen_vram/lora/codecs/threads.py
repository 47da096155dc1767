"""Limits on the number of threads that torch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the calling thread compute without OpenMP threads.

    Such threads would wait for a core beside the threads that merge, and the threads that wait for them would spin.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute_alone() -> None:
    """Let a new thread compute without OpenMP threads until it ends."""
    torch.get_num_threads()  # otherwise its first operation uses the number that any thread set last
    torch.set_num_threads(1)
