"""Return of memory that libraries and errors keep, to the system and the driver."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import FrameType, FunctionType

import torch

_CALLS_MODULES = "torch.nn.modules.module"


def give_back_memory() -> None:
    """Collect garbage, and return cached memory of GPUs, of pinned memory, and of the C library's heap."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        _empty_host_cache()
    give_back_heap()


@contextmanager
def nothing_left_after_a_failure() -> Iterator[None]:
    """After an error or an interrupt, free all memory of the unfinished work and of the error's frames."""
    handled = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        forget_frames(error, handled)
        give_back_memory()
        raise


def forget_frames(error: BaseException, handled: BaseException | None = None) -> None:
    """Clear the variables of the frames that an error refers to, such as models, caches and logits.

    Frames that still run keep their variables, and the text of the traceback does not change.

    Args:
        handled: An error that was already being handled; it belongs to the caller and does not change.
    """
    done: list[BaseException | None] = [None, handled]
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or any(one is other for other in done):
            continue
        done.append(one)
        traceback.clear_frames(one.__traceback__)
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if frame.f_globals.get("__name__") == _CALLS_MODULES:
                _forget_arguments(frame)
        pending += [one.__cause__, one.__context__]


def _forget_arguments(frame: FrameType) -> None:
    """Clear the references of torch's call of a module with hooks: its arguments are in a closure, not in a frame.

    Source: torch 2.13, torch/nn/modules/module.py, `_call_impl` and its `inner`. Python 3.10's frames have no function.
    """
    for function in gc.get_referents(frame):
        if isinstance(function, FunctionType) and function.__code__ is frame.f_code:
            for cell in function.__closure__ or ():
                with suppress(ValueError):  # it is already empty
                    del cell.cell_contents


def give_back_heap() -> None:
    """Return the free pages of the C library's heap to the system; do nothing without `malloc_trim`.

    glibc keeps pages below the highest block in use, such as the temporary tensors of quantizing. Measured: torch 2.13
    on the CPU, bitsandbytes 0.50.2, the bundled checkpoint in nf4, 2026-11-30.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found


def _empty_host_cache() -> None:
    """Unpin host memory that torch caches; do nothing if torch has no such function."""
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()
