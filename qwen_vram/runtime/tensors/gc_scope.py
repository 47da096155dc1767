"""Control of Python's garbage collector while a model loads."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

# Python 3.12 freezes some of its own objects at its start (375). A program that freezes objects has far more.
_FROZEN_AT_START = 10_000
# Bytes on a GPU from which on a model may be there, and not only memory of torch, such as cuBLAS' workspace.
_MAY_BE_A_MODEL = 2**26


def collect_dropped(devices: Iterable[torch.device]) -> None:
    """Free models that were dropped without `close()`, if GPUs may hold one, so that plans get their memory."""
    if any(one.type == "cuda" and torch.cuda.memory_allocated(one) > _MAY_BE_A_MODEL for one in devices):
        gc.collect()


@contextmanager
def garbage_of_this_load() -> Iterator[None]:
    """Let the garbage collector scan only new objects: the imports of `transformers` cost it 0.2 s each time."""
    if gc.get_freeze_count() > _FROZEN_AT_START:  # the program's own frozen objects would be unfrozen
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
