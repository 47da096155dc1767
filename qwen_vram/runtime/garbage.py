"""The garbage collector while a model loads."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Bytes on a GPU that are no longer only what torch keeps for itself, such as cuBLAS' workspace.
_MAY_BE_A_MODEL = 2**26


@contextmanager
def garbage_of_this_load() -> Iterator[None]:
    """Have the garbage collector look at new objects alone: all that `transformers` imported takes it 0.2 s a time."""
    if gc.get_freeze_count():  # they are the program's own, and would be let go
        yield
        return
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > _MAY_BE_A_MODEL:
        gc.collect()  # what was dropped, and not closed, would stay through this load
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
