"""Calls in fresh processes: one whose CUDA context, kernels and allocator have seen nothing before.

Processes fork from a server that has imported torch and transformers and never touches CUDA, so that one starts in a
fraction of a second. Where there is no fork, each imports for itself.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["qwen_vram.runtime.loading.load", "transformers.models.qwen2.modeling_qwen2"]


class Ended(NamedTuple):
    """How a call ended: its item, and its value, or what went wrong."""

    item: Any
    value: Any = None
    error: str = ""


def call_each(function: Callable[[Any], Any], items: Iterable[Any], *, jobs: int = 1) -> Iterator[Ended]:
    """`function(item)` for each item, each in a fresh process, `jobs` at a time, in the order in which they end.

    Args:
        function: A function of a module; it, the items and its values cross between processes by pickle.
    """
    context: Any = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(_call, context, function, item) for item in items]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _call(context: Any, function: Callable[[Any], Any], item: Any) -> Ended:
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, function, item), daemon=True)
    process.start()
    sending.close()
    try:
        value, error = receiving.recv()
    except EOFError:
        process.join()
        value, error = None, f"the process ended without a word, exit code {process.exitcode}"
    process.join()
    return Ended(item, value, error)


def _send(sending: Connection, function: Callable[[Any], Any], item: Any) -> None:
    try:
        sending.send((function(item), ""))
    except BaseException:
        sending.send((None, traceback.format_exc()))
        raise SystemExit(1) from None
