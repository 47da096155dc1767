"""Calls of a function in fresh processes, each with a new CUDA context and allocator.

Processes fork from a server that has imported torch and transformers and never uses CUDA, so one starts in a fraction
of a second. If the system has no fork, each process imports for itself.
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
    """The end of a call: its item, and its value or its error."""

    item: Any
    value: Any = None
    error: str = ""


def call_each(function: Callable[[Any], Any], items: Iterable[Any], *, jobs: int = 1) -> Iterator[Ended]:
    """Yield the results of `function(item)`, each in a fresh process, `jobs` at a time, in the order in which they end.

    Args:
        function: A function of a module. The function, the items and the values are pickled between processes.
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
