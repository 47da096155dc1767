"""The proof: how much of an update survived rounding or quantization, summed up piece by piece."""

from __future__ import annotations

import math
from threading import Lock
from typing import NamedTuple

import torch

from qwen_vram.lora.codecs.scratch import scratch

# Relative size of what float32 leaves of updates that cancel, as of an adapter with the weights 1 and -1: half a unit
# in the last place (2**-24) for each sum. No share of that means anything.
_RESIDUE = 2.0**-21


class Blocks(NamedTuple):
    """What a piece adds block by block, because the scale of each block is still to be quantized itself.

    Attributes:
        scales: Scale of each block as the piece was decoded with it.
        products: `<decoded, update>` of each block.
        errors: Largest difference of a decoded from a merged weight in each block.
    """

    scales: torch.Tensor
    products: torch.Tensor
    errors: torch.Tensor


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
        error = stored.sub_(merged)
        low, high = torch.aminmax(error)
        self._add(base, merged.sub_(base), error, torch.maximum(-low, high))

    def add_blocks(
        self, base: torch.Tensor, merged: torch.Tensor, decoded: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> Blocks:
        """Count a piece that was decoded with `scales`, one for `group_size` weights, which are not final."""
        base, merged, decoded = base.reshape(-1), merged.reshape(-1), decoded.reshape(-1)
        error = torch.sub(decoded, merged, out=scratch("error", merged.shape, torch.float32, merged.device))
        update = merged.sub_(base)
        products = _by_block(decoded.mul_(update), group_size).sum(dim=1)
        self._add(base, update, error, products.new_zeros(()))
        bits = _by_block(error.abs_(), group_size).view(torch.int32)  # in the order of the floats, quicker to compare
        return Blocks(scales, products, bits.amax(dim=1).view(torch.float32))

    def settle(self, blocks: Blocks, scales: torch.Tensor) -> None:
        """Correct what `add_blocks` counted, now that `scales` are final.

        Exact for the share. The largest error is then an upper bound, too high by at most the change of a scale.
        """
        change = scales - blocks.scales
        relative = torch.where(blocks.scales > 0, change / blocks.scales, 0.0)
        kept = float(torch.sum(relative.double() * blocks.products.double()))
        self._count(kept, 0.0, 0.0, float((blocks.errors + change.abs()).max()))

    def _add(self, base: torch.Tensor, update: torch.Tensor, error: torch.Tensor, largest: torch.Tensor) -> None:
        """Count sums of a piece, and the largest error given; `stored - base` is `update + error`."""
        update_squared = torch.dot(update, update)
        kept = torch.dot(error, update) + update_squared
        self._count(*torch.stack([kept, update_squared, torch.dot(base, base), largest]).tolist())

    def _count(self, kept: float, update_squared: float, base_squared: float, error: float) -> None:
        with self._lock:
            self.kept += kept
            self.update_squared += update_squared
            self.base_squared += base_squared
            # max() would lose a NaN
            self.largest_error = error if not error <= self.largest_error else self.largest_error

    @property
    def share(self) -> float | None:
        """Share of the update that is left; `None` where there is no update but float32's own rounding."""
        if self.update_squared <= _RESIDUE**2 * self.base_squared:
            return None
        return self.kept / self.update_squared

    @property
    def relative_size(self) -> float | None:
        """Norm of the update over the norm of the base; `None` where that is zero."""
        return math.sqrt(self.update_squared / self.base_squared) if self.base_squared else None


def _by_block(values: torch.Tensor, size: int) -> torch.Tensor:
    """One row for each block; zeros fill up the last one."""
    missing = -values.numel() % size
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, size)
