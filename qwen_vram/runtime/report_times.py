"""Predicted and measured times of a generation, for reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from qwen_vram.arithmetic.timing.generation import Times, predict_times
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.scheduling.clock import Timed


class ReportedTimes(NamedTuple):
    """The predicted and the measured times of a generation."""

    predicted: Times
    measured: Timed

    @classmethod
    def of(cls, plan: Plan, timed: Timed | None) -> ReportedTimes | None:
        """Return the times of the last generation; `None` before the first."""
        known = plan.estimate
        if timed is None or known.architecture is None:
            return None
        what = (known.architecture, plan.profile, timed.workload, known.machine)
        return cls(predict_times(*what, on_cpu=plan.on_cpu), timed)

    def to_dict(self) -> dict[str, Any]:
        """Return predicted and measured milliseconds by figure, and the machine of the prediction."""
        return {
            **{name: {"predicted": predicted, "measured": measured} for name, predicted, measured in self._figures()},
            "machine": self.predicted.machine,
            "rates": "measured" if self.predicted.measured else "stated",
        }

    def lines(self) -> list[str]:
        """Return rows of the report's table, and the machine; the time per token is missing without a second token."""
        labels = {"ms_per_token": "ms a token", "first_token_ms": "first token, ms"}
        rows = [
            f"{labels[name]:15}{predicted:>16,.1f}{measured:>16,.1f}{'':>12}{(predicted - measured) / measured:>+9.1%}"
            for name, predicted, measured in self._figures()
            if measured
        ]
        return [*rows, f"times predicted for {self.predicted.place}"]

    def _figures(self) -> Iterator[tuple[str, float, float | None]]:
        for name in ("ms_per_token", "first_token_ms"):
            yield name, getattr(self.predicted, name), getattr(self.measured, name)
