"""The garbage collector while a model loads."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

# Python 3.12 freezes some of its own objects as it starts, 375 there; a program that freezes has imported far more.
_FROZEN_AT_START = 10_000
# Bytes on a GPU that are no longer only what torch keeps for itself, such as cuBLAS' workspace.
_MAY_BE_A_MODEL = 2**26


def collect_dropped(devices: Iterable[torch.device]) -> None:
    """Let go of models that were dropped and not closed, where GPUs may hold one: no plan should have to spare it."""
    if any(one.type == "cuda" and torch.cuda.memory_allocated(one) > _MAY_BE_A_MODEL for one in devices):
        gc.collect()


@contextmanager
def garbage_of_this_load() -> Iterator[None]:
    """Have the garbage collector look at new objects alone: all that `transformers` imported takes it 0.2 s a time."""
    if gc.get_freeze_count() > _FROZEN_AT_START:  # they are the program's own, and would be let go
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
