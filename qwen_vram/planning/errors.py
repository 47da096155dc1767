"""The error for a budget that no plan fits."""

from __future__ import annotations

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.errors import QwenVramError
from qwen_vram.spec.workload import Workload


class DoesNotFitError(QwenVramError):
    """No plan fits the budget, or the requested one does not.

    Attributes:
        needed_bytes: Bytes that the smallest plan needs on the device or host that lacks memory.
        budget_bytes: Bytes that this device or host offers.
        estimate: The estimate of that plan.
        nearest: A workload that would fit; `None` if not even one token fits.
        devices: Bytes that it needs of each GPU and bytes that the GPU offers, by the GPU's number, if the budget names
            several GPUs.
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
