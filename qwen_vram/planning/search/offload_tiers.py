"""Tiers of layers: on the device, in host memory, and on the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.timing.decode import decode_ms
from qwen_vram.arithmetic.weights import (
    computing_copies,
    streaming_slots,
    weight_bytes,
)
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.planning.capacity.fit import fits, needed, on_device
from qwen_vram.planning.support import not_loadable
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.rules.table import may_be_on_disk
from qwen_vram.spec.workload import Workload


class Tiers:
    """The spreading of a profile's layers over the device, the host and the disk of a budget.

    Args:
        estimate: Makes the estimate of a profile for a workload.
        start: The profile that the search began with.
        may_read: Layers may stay on the disk, because the caller left that open.
    """

    def __init__(
        self,
        architecture: Architecture,
        budget: Budget,
        estimate: Callable[[Profile, Workload], Estimate],
        start: Profile,
        *,
        may_read: bool,
    ) -> None:
        self.architecture = architecture
        self.budget = budget
        self.estimate = estimate
        self.start = start
        self.may_read = may_read

    def resident_first(self, base: Profile, workload: Workload) -> Estimate:
        """Estimate `base` with the most of its streamed layers that the device holds resident."""

        def streaming(layers: int) -> Estimate:
            return self.estimate(replace(base, streamed_layers=layers, host_layers=0, disk_layers=0), workload)

        layers = base.streamed_layers
        resident = most(layers, lambda resident: on_device(streaming(layers - resident), self.budget))
        return streaming(layers - resident)

    def fewest_on_disk(self, result: Estimate) -> Estimate:
        """Estimate `result` with the most of its streamed layers that the host holds, and the others on the disk.

        Without a GPU, layers are resident in host memory, or on the disk.
        """
        profile = result.profile
        if fits(result, self.budget) or not self.may_read_layers(profile):
            return result
        if self.budget.vram is None and not self.start.streamed_layers:
            return self._fewest_off_device(profile, result.workload)
        taken = result.host if self.budget.vram is not None else needed(result, self.budget)
        free = self.budget.ram - taken + weight_bytes(self.architecture, profile).host

        def on_disk(kept: int) -> Profile:
            return replace(profile, disk_layers=profile.streamed_layers - max(kept, profile.host_layers))

        kept = most(profile.streamed_layers, lambda kept: weight_bytes(self.architecture, on_disk(kept)).host <= free)
        return self.estimate(on_disk(kept), result.workload)

    def quickest(self, result: Estimate) -> Estimate:
        """Estimate `result` with the smallest number of computing host layers that makes a decode step shortest.

        This is for one sequence only, because the rates are measured for one. Copies for the CPU must fit on the host.
        """
        profile = result.profile
        if result.workload.batch_size > 1 or not self._may_compute(profile):
            return result
        choices = [
            replace(profile, host_layers=count) for count in range(profile.streamed_layers - profile.disk_layers + 1)
        ]
        free = self.budget.ram - result.host
        held = [choice for choice in choices if computing_copies(self.architecture, choice) <= free]
        best = min(held, key=lambda choice: decode_ms(self.architecture, choice, result.workload, result.machine))
        return self.estimate(best, result.workload)

    def _fewest_off_device(self, base: Profile, workload: Workload) -> Estimate:
        """Estimate `base` without a GPU, with the most layers that the host holds, and the others on the disk."""
        layers = self.architecture.num_hidden_layers
        if streaming_slots(self.architecture, replace(base, streamed_layers=layers)) > 2:
            layers -= 1  # a third slot would take its bytes

        def reading(away: int) -> Estimate:
            return self.estimate(replace(base, streamed_layers=away, disk_layers=away), workload)

        return reading(layers - most(layers, lambda resident: fits(reading(layers - resident), self.budget)))

    def _may_compute(self, profile: Profile) -> bool:
        """Tell if a streamed layer can compute on the CPU instead."""
        one = replace(profile, host_layers=1)
        return profile.streamed_layers > profile.disk_layers and not_loadable(self.architecture, one) is None

    def may_read_layers(self, profile: Profile) -> bool:
        """Tell if layers of `profile` may stay on the disk: the caller left it open, and the files have its format."""
        as_stored = self.architecture.stored_format is not None or profile.dtype == self.architecture.dtype
        return profile.cache != "paged" and self.may_read and as_stored and may_be_on_disk(self.architecture, profile)


def most(limit: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number up to `limit` that holds, if every smaller one does; 0 if 1 does not.

    >>> most(100, lambda number: number <= 42)
    42
    """
    if limit > 0 and holds(limit):
        return limit
    low, high = 0, limit - 1
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return max(0, low)
