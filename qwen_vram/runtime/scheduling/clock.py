"""Times of a generation by the device's clock, so that nothing waits for it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qwen_vram.spec.workload import Workload


class Timed(NamedTuple):
    """Measured milliseconds of a generation.

    Attributes:
        workload: The workload, with the number of generated tokens.
        first_token_ms: From the call of the model's `generate` to the first token.
        ms_per_token: Mean for each later token; `None` without later tokens.
    """

    workload: Workload
    first_token_ms: float
    ms_per_token: float | None


class Clock:
    """The clock of one generation on a device, whose current stream computes the generation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._first: Any = None

    def begin(self) -> None:
        """Note the beginning of the generation."""
        self._began = self._now()

    def token(self) -> None:
        """Note that the kernels of a token are launched; only the first call has an effect."""
        if self._first is None:
            self._first = self._now()

    def end(self, workload: Workload, made: int) -> Timed | None:
        """Return the times, with `made` tokens of each sequence; `None` if no token was noted."""
        ended = self._now()
        if self._first is None or made < 1:
            return None
        if self._device.type == "cuda":
            ended.synchronize()
        rest = self._between(self._first, ended) / (made - 1) if made > 1 else None
        ran = replace(workload, max_new_tokens=made)
        return Timed(ran, self._between(self._began, self._first), rest)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event
        now = event(enable_timing=True)
        now.record(torch.cuda.current_stream(self._device))
        return now

    def _between(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two times."""
        return float(start.elapsed_time(end)) if self._device.type == "cuda" else 1000 * float(end - start)
