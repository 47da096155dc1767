"""The share of an update that survives rounding or quantization."""

from __future__ import annotations

import math
from threading import Lock
from typing import NamedTuple

import torch

from qwen_vram.lora.codecs.scratch import scratch

# Relative size of the rest in float32 of updates that cancel, such as an adapter with the weights 1 and -1. It is half
# a unit in the last place (2**-24) for each sum. A share of this rest has no meaning.
_RESIDUE = 2.0**-21


class Blocks(NamedTuple):
    """Sums of a piece by block, for scales that are still to be quantized themselves.

    Attributes:
        scales: Scale of each block as the piece was decoded with it.
        products: `<decoded, update>` of each block.
        errors: Largest difference of a decoded from a merged weight in each block.
    """

    scales: torch.Tensor
    products: torch.Tensor
    errors: torch.Tensor


class Proof:
    """Sums over one tensor, which show the share of its update that is kept. Any thread may add to it.

        share = <stored - base, update> / <update, update>

    with `update = merged - base` in float32, and `stored` the weights that products will use. 1 means that the whole
    update is kept on average. 0 means that the stored weights are those of the base, or differ from them only at
    random. Random rounding cancels, with a standard deviation of about (rounding error / update size) / sqrt(weights).
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.kept = 0.0
        self.update_squared = 0.0
        self.base_squared = 0.0
        self.largest_error = 0.0

    def add(self, base: torch.Tensor, merged: torch.Tensor, stored: torch.Tensor) -> None:
        """Add a piece: three float32 tensors of the same shape. `merged` and `stored` are overwritten."""
        base, merged, stored = base.reshape(-1), merged.reshape(-1), stored.reshape(-1)
        error = stored.sub_(merged)
        low, high = torch.aminmax(error)
        self._add(base, merged.sub_(base), error, torch.maximum(-low, high))

    def add_blocks(
        self, base: torch.Tensor, merged: torch.Tensor, decoded: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> Blocks:
        """Add a piece that was decoded with `scales` that are not final, one for `group_size` weights."""
        base, merged, decoded = base.reshape(-1), merged.reshape(-1), decoded.reshape(-1)
        error = torch.sub(decoded, merged, out=scratch("error", merged.shape, torch.float32, merged.device))
        update = merged.sub_(base)
        products = _by_block(decoded.mul_(update), group_size).sum(dim=1)
        self._add(base, update, error, products.new_zeros(()))
        bits = _by_block(error.abs_(), group_size).view(torch.int32)  # in the order of the floats, faster to compare
        return Blocks(scales, products, bits.amax(dim=1).view(torch.float32))

    def settle(self, blocks: Blocks, scales: torch.Tensor) -> None:
        """Correct the sums of `add_blocks` with the final `scales`.

        The share is then exact. The largest error is an upper bound, too high by at most the change of a scale.
        """
        change = scales - blocks.scales
        relative = torch.where(blocks.scales > 0, change / blocks.scales, 0.0)
        kept = float(torch.sum(relative.double() * blocks.products.double()))
        self._count(kept, 0.0, 0.0, float((blocks.errors + change.abs()).max()))

    def _add(self, base: torch.Tensor, update: torch.Tensor, error: torch.Tensor, largest: torch.Tensor) -> None:
        """Add the sums of a piece, with the given largest error; `stored - base` is `update + error`."""
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
        """Share of the update that is kept; `None` if the update is only the rounding of float32."""
        if self.update_squared <= _RESIDUE**2 * self.base_squared:
            return None
        return self.kept / self.update_squared

    @property
    def relative_size(self) -> float | None:
        """Norm of the update over the norm of the base; `None` if the base is zero."""
        return math.sqrt(self.update_squared / self.base_squared) if self.base_squared else None


def _by_block(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return `values` with one row for each block; zeros fill the last row."""
    missing = -values.numel() % size
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, size)
