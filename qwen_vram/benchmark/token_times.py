"""Times of single tokens, by a streamer, and the energy of a GPU between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from qwen_vram.planning.capacity.nvml import told

# A GPU's counter of energy advances in intervals that the driver does not state. Nothing is told of shorter times.
_SHORTEST_SECONDS = 1.0


class TokenTimes(BaseStreamer):  # type: ignore[misc]
    """Streamer that notes the time of each token, from its creation on.

    Args:
        on_first: Called after the first token.
    """

    def __init__(self, on_first: Callable[[], object] = lambda: None) -> None:
        self._on_first = on_first
        self._prompt = True
        self._began = time.perf_counter()
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time of a step's tokens; `generate` hands on the prompt first."""
        if self._prompt:
            self._prompt = False
            return
        self._times.append(time.perf_counter())
        if len(self._times) == 1:
            self._on_first()

    def end(self) -> None:
        """End without an effect."""

    @property
    def first_token_ms(self) -> float | None:
        """Milliseconds to the first token; `None` if there was none."""
        return 1_000 * (self._times[0] - self._began) if self._times else None

    def step_ms(self) -> tuple[float | None, float | None]:
        """Return the median and the 90th percentile of the milliseconds between tokens; `None` without two tokens."""
        steps = [1_000 * (later - before) for before, later in zip(self._times, self._times[1:], strict=False)]
        if len(steps) < 2:
            return (steps[0], steps[0]) if steps else (None, None)
        return statistics.median(steps), statistics.quantiles(steps, n=10, method="inclusive")[-1]


class EnergyMeter:
    """Meter of the energy that a GPU takes, by its own counter; it knows nothing of a CPU."""

    def __init__(self, pynvml: ModuleType | None, device: torch.device) -> None:
        self._ask: Callable[[], Any] = lambda: None
        self._before: tuple[Any, float] = (None, 0.0)
        if pynvml is not None and device.type == "cuda":
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = told(pynvml, "nvmlDeviceGetHandleByUUID", uuid)
            if handle is not None:
                self._ask = lambda: told(pynvml, "nvmlDeviceGetTotalEnergyConsumption", handle)

    def start(self) -> None:
        """Begin to measure."""
        self._before = self._ask(), time.perf_counter()

    def tokens_per_joule(self, tokens: int) -> float | None:
        """Return tokens over the joules since the start; `None` if the GPU does not tell, and for a short time."""
        millijoules, began = self._before
        now = self._ask()
        if not tokens or millijoules is None or now is None or time.perf_counter() - began < _SHORTEST_SECONDS:
            return None
        return 1_000 * tokens / (now - millijoules) if now > millijoules else None
