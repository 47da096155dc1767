"""The proof: how much of an update survived rounding or quantization, summed up piece by piece."""

from __future__ import annotations

import math
from threading import Lock

import torch


class Proof:
    """Sums over one tensor. Any thread may add to it.

        share = <stored - base, update> / <update, update>

    with `update = merged - base` in float32 and `stored` the weights as they will be computed with. 1 means that the
    whole update is there on average; 0 that the stored weights are the base's, or differ from it at random only. What
    rounding adds at random cancels, with a standard deviation of about (rounding error / update size) / sqrt(weights).
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.kept = 0.0
        self.update_squared = 0.0
        self.base_squared = 0.0
        self.largest_error = 0.0

    def add(self, base: torch.Tensor, merged: torch.Tensor, stored: torch.Tensor) -> None:
        """Count a piece: three float32 tensors of the same shape. `merged` and `stored` are used up."""
        base, merged, stored = base.reshape(-1), merged.reshape(-1), stored.reshape(-1)
        low, high = torch.aminmax(stored - merged)
        update = merged.sub_(base)
        kept = torch.dot(stored.sub_(base), update)
        sums = torch.stack([kept, torch.dot(update, update), torch.dot(base, base), torch.maximum(-low, high)]).tolist()
        with self._lock:
            self.kept += sums[0]
            self.update_squared += sums[1]
            self.base_squared += sums[2]
            # max() would lose a NaN
            self.largest_error = sums[3] if not sums[3] <= self.largest_error else self.largest_error

    @property
    def share(self) -> float | None:
        """Share of the update that is left; `None` where there is no update."""
        return self.kept / self.update_squared if self.update_squared else None

    @property
    def relative_size(self) -> float | None:
        """Norm of the update over the norm of the base; `None` where that is zero."""
        return math.sqrt(self.update_squared / self.base_squared) if self.base_squared else None
