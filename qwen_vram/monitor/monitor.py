"""`Monitor`: samples in a thread, while a program does its work."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from qwen_vram.errors import UnitError
from qwen_vram.monitor.log import Log
from qwen_vram.monitor.sample import Sample, take

_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
SHORTEST = 0.05


def parse_interval(every: str | float) -> float:
    """Return seconds of an interval such as `"10s"`, `"500ms"`, `"2min"`, or a number of seconds.

    Raises:
        UnitError: it has no such form, or is shorter than 50 ms.

    Example:
        >>> parse_interval("2min")
        120.0
    """
    seconds = math.nan
    if isinstance(every, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|h)\s*", every)
        if match:
            seconds = float(match[1]) * _UNITS[match[2]]
    elif not isinstance(every, bool):
        seconds = float(every)
    if not SHORTEST <= seconds < math.inf:
        raise UnitError(
            f"every must be a time of at least 50ms, such as '10s', '500ms' or '2min', got {every!r}", got=every
        )
    return seconds


class Monitor:
    """A thread that takes a sample at once, one every interval, and one at the end.

        with Monitor(every="1s", log="run.jsonl") as monitor:
            llm.chat("...")
        print(monitor.peak)

    Attributes:
        samples: The samples so far, at most the newest `keep` ones.
        peak: The most bytes that were used on each GPU, by UUID; of the host, the most that were not available.
        on_sample: Called with each sample, in the monitor's thread.

    Args:
        every: The interval, such as `"10s"`, or seconds.
        log: A file to which each sample is appended as a JSON line; `read_log` reads it.
        keep: The most samples in memory.

    Raises:
        UnitError: `every` is not an interval.
        LogError: the log cannot be written.
    """

    def __init__(
        self,
        every: str | float = "10s",
        *,
        log: str | Path | None = None,
        keep: int = 10_000,
        on_sample: Callable[[Sample], None] | None = None,
    ) -> None:
        self.every = parse_interval(every)
        self.samples: list[Sample] = []
        self.peak: dict[str, int] = {}
        self._keep, self.on_sample = keep, on_sample
        self._log_path = log
        self._stack = ExitStack()
        self._log: Log | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> Monitor:
        """Take the first sample, and start the thread."""
        self._ended.clear()
        if self._log_path is not None:
            self._log = self._stack.enter_context(Log(self._log_path))
        try:
            self._take()
        except BaseException:
            self._stack.close()
            raise
        self._thread = threading.Thread(target=self._run, name="qwen_vram monitor", daemon=True)
        self._thread.start()
        return self

    def once(self, on_sample: Callable[[Sample], None]) -> None:
        """Take one sample, without a thread."""
        with ExitStack() as stack:
            self._log = None if self._log_path is None else stack.enter_context(Log(self._log_path))
            self.on_sample = on_sample
            self._take()
        self._log = None

    def stop(self) -> None:
        """End the thread after a last sample.

        Raises:
            LogError: the log could not be written.
        """
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        self._stack.close()
        self._log = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the monitor ends, or for some seconds."""
        self._ended.wait(seconds)

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        due = time.monotonic() + self.every
        try:
            while not self._ended.wait(max(0.0, due - time.monotonic())):
                self._take()
                due = max(due + self.every, time.monotonic())
            self._take()
        except BaseException as error:
            self._error = error
            self._ended.set()

    def _take(self) -> None:
        sample = take()
        self.samples = [*self.samples[-self._keep + 1 :], sample] if self._keep > 1 else [sample]
        for gpu in sample.gpus:
            self.peak[gpu.uuid] = max(self.peak.get(gpu.uuid, 0), gpu.used)
        self.peak["host"] = max(self.peak.get("host", 0), sample.host.total - sample.host.available)
        if self._log is not None:
            self._log.write(sample)
        if self.on_sample is not None:
            self.on_sample(sample)
