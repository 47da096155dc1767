"""How many threads torch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """The calling thread computes alone.

    Beside the threads that merge, others of OpenMP would wait for a core, and those that wait for them spin.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute_alone() -> None:
    """Have a new thread compute alone for as long as it lives."""
    torch.get_num_threads()  # or its first operation takes over the number that was last set in any thread
    torch.set_num_threads(1)
