"""The error for a budget that no plan fits."""

from __future__ import annotations

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.errors import QwenVramError
from qwen_vram.spec.workload import Workload


class DoesNotFitError(QwenVramError):
    """No plan, or not the plan asked for, fits the budget.

    Attributes:
        needed_bytes: What the smallest plan tried needs on the device that is short.
        budget_bytes: What that device offers.
        estimate: The estimate of that plan.
        nearest: A workload that would fit, or `None` where even one token does not.
        devices: What it needs of each GPU by its number, and what that offers, where the budget names several.
    """

    def __init__(
        self,
        message: str,
        *,
        needed_bytes: int,
        budget_bytes: int,
        estimate: Estimate,
        nearest: Workload | None,
        devices: dict[int, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.estimate = estimate
        self.nearest = nearest
        self.devices = devices or {}
