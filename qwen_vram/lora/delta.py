"""The update of one tensor by an adapter, computed in float32, some rows at a time.

The operations and their order are those of PEFT's `merge_and_unload` on a float32 base, so results agree bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from qwen_vram.lora.codecs.scratch import scratch
from qwen_vram.lora.tensor_file import SMALLEST_PIECE_ROWS, StoredTensor, pieces

# Elements of a block of columns for the norms of a DoRA embedding: 256 MiB in float32.
_NORM_BLOCK = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """`scale * b @ a`, added to a weight.

    Attributes:
        a, b: `(rank, in)` and `(out, rank)`; for an embedding `(rank, vocab_size)` and `(hidden_size, rank)`.
        magnitude: DoRA's vector, one number for each output of the module; `None` without DoRA.
        embedding: The product is transposed, because an embedding matrix has its outputs in columns.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Trained rows of an embedding matrix: `values[i]` replaces row `indices[i]`."""

    values: StoredTensor
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """All changes of one adapter to one tensor, in this order: replace it, add to it, replace rows of it.

    Attributes:
        adapter: Number of the adapter, counted from 0.
        weight: The adapter's factor in the sum.
        replacement: Replaces the tensor.
        shift: Added to a bias, times its scale.
    """

    adapter: int
    weight: float
    replacement: StoredTensor | None = None
    low_rank: LowRank | None = None
    shift: tuple[StoredTensor, float] | None = None
    tokens: TokenRows | None = None

    @property
    def is_sum(self) -> bool:
        """True if it adds a term that does not depend on the tensor, so that `weight` is a plain factor."""
        dora = self.low_rank is not None and self.low_rank.magnitude is not None
        return self.replacement is None and self.tokens is None and not dora

    def source(self, base: StoredTensor) -> StoredTensor:
        """Return the tensor that is adapted: the base's own, or its replacement."""
        return self.replacement or base


class LoadedUpdate:
    """An update with its factors in float32 on `device`, without rounding and storage formats."""

    def __init__(self, update: Update, base: StoredTensor, device: torch.device) -> None:
        self.update = update
        self.base = base
        self.device = device
        # PEFT multiplies the product by alpha / rank. The adapter's weight is a factor of that number.
        self.factor = update.weight if update.is_sum else 1.0
        if update.low_rank is not None:
            self.a = update.low_rank.a.float32(device)
            self.b = update.low_rank.b.float32(device)
            if update.low_rank.magnitude is not None:
                self.magnitude = update.low_rank.magnitude.float32(device)
                if update.low_rank.embedding:
                    self.norms = self._column_norms(update.low_rank)
        if update.shift is not None:
            self.shift = update.shift[0].float32(device) * (update.shift[1] * self.factor)
        if update.tokens is not None:
            self.token_values = update.tokens.values.float32(device)
            self.token_indices = torch.tensor(update.tokens.indices, device=device)

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` as changed by this adapter alone; `rows` are those of the base, unchanged.

        The result is valid until this thread's next call.
        """
        merged = rows
        if self.update.replacement is not None:
            merged = self.update.replacement.float32(self.device, start, stop)
        if self.update.low_rank is not None:
            merged = self._with_low_rank(self.update.low_rank, merged, start, stop)
        if self.update.shift is not None:
            merged = merged + self.shift[start:stop]
        if self.update.tokens is not None:
            inside = (self.token_indices >= start) & (self.token_indices < stop)
            merged = merged.index_copy(0, self.token_indices[inside] - start, self.token_values[inside])
        if not self.update.is_sum and self.update.weight != 1.0:
            merged = rows + self.update.weight * (merged - rows)
        return merged

    def add_to(self, merged: torch.Tensor, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return `merged`, the result of earlier adapters, plus the change of this one to the base's `rows`."""
        if self.update.is_sum:
            return self.apply(merged, start, stop)
        return merged + (self.apply(rows, start, stop) - rows)

    def _with_low_rank(self, low_rank: LowRank, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        product, scale = self._product(low_rank, start, stop), low_rank.scale * self.factor
        if abs(math.frexp(scale)[0]) != 0.5:
            product.mul_(scale)
            scale = 1.0
        # A scale that is a power of 2 is applied in the sum: it is exact with and without a fused multiply-add.
        merged = torch.add(rows, product, alpha=scale, out=product)
        if low_rank.magnitude is None:
            return merged
        if low_rank.embedding:
            return merged.mul_((self.magnitude / self.norms).view(1, -1))
        norms = torch.linalg.norm(merged, dim=1)
        return merged.mul_((self.magnitude[start:stop] / norms).view(-1, 1))

    def _product(self, low_rank: LowRank, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of the product, without the scale."""
        b, a = (self.b, self.a[:, start:stop]) if low_rank.embedding else (self.b[start:stop], self.a)
        name = f"product {self.update.adapter}"
        product = torch.mm(b, a, out=scratch(name, (len(b), a.shape[1]), torch.float32, self.device))
        return product.T if low_rank.embedding else product

    def _column_norms(self, low_rank: LowRank) -> torch.Tensor:
        """Return the norm of each column of an adapted embedding matrix, `(hidden_size,)`, for DoRA.

        A column extends over the whole vocabulary, so the matrix is read once for every block of columns.
        """
        source = self.update.source(self.base)
        num_rows, width = source.shape
        count = max(width // max(_NORM_BLOCK // num_rows, SMALLEST_PIECE_ROWS), 1)
        bounds = [width * index // count for index in range(count + 1)]
        norms = []
        for left, right in pairwise(bounds):
            block = torch.empty((num_rows, right - left), dtype=torch.float32, device=self.device)
            for start, stop in pieces(num_rows, width):
                block[start:stop] = source.read(start, stop)[:, left:right]
            product = (self.b[left:right] @ self.a).T.mul_(low_rank.scale)
            norms.append(torch.linalg.norm(block.T + product.T, dim=1))
        return torch.cat(norms)
