"""What an adapter makes of one tensor, in float32, a piece of rows at a time.

The operations and their order are PEFT's `merge_and_unload` on a float32 base, so that results agree bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from qwen_vram.lora.codecs.scratch import scratch
from qwen_vram.lora.tensor_file import SMALLEST_PIECE_ROWS, StoredTensor, pieces

# Elements of the column block that a DoRA embedding's norms are taken over: 256 MiB in float32.
_NORM_BLOCK = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """`scale * b @ a`, added to a weight.

    Attributes:
        a, b: `(rank, in)` and `(out, rank)`; of an embedding `(rank, vocab_size)` and `(hidden_size, rank)`.
        magnitude: DoRA's vector, one number for each output of the module; `None` without DoRA.
        embedding: The product is transposed, because a table holds its outputs in columns.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Rows of a table that were trained: `values[i]` takes the place of row `indices[i]`."""

    values: StoredTensor
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """All that one adapter does to one tensor, in this order: replace it, add to it, replace rows of it.

    Attributes:
        adapter: Number of the adapter, counted from 0.
        weight: The adapter's factor in the sum.
        replacement: Takes the tensor's place.
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
        """Tell if it adds something that does not depend on the tensor, so that weights are plain factors."""
        dora = self.low_rank is not None and self.low_rank.magnitude is not None
        return self.replacement is None and self.tokens is None and not dora

    def source(self, base: StoredTensor) -> StoredTensor:
        """The tensor that is adapted: the base's own, or the one that takes its place."""
        return self.replacement or base


class LoadedUpdate:
    """An update with its factors in float32 on `device`. It knows nothing of rounding and formats."""

    def __init__(self, update: Update, base: StoredTensor, device: torch.device) -> None:
        self.update = update
        self.base = base
        self.device = device
        # PEFT multiplies the product by alpha / rank; the adapter's weight is part of that one number.
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
        """Rows `start` to `stop` as this adapter alone makes them; `rows` are the base's, and stay as they are.

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
        """`merged`, made by the adapters before, with what this one changes in the base's `rows` added."""
        if self.update.is_sum:
            return self.apply(merged, start, stop)
        return merged + (self.apply(rows, start, stop) - rows)

    def _with_low_rank(self, low_rank: LowRank, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        product, scale = self._product(low_rank, start, stop), low_rank.scale * self.factor
        if abs(math.frexp(scale)[0]) != 0.5:
            product.mul_(scale)
            scale = 1.0
        # A power of 2 is left to the sum: what it scales is exact, with and without a fused multiply-add.
        merged = torch.add(rows, product, alpha=scale, out=product)
        if low_rank.magnitude is None:
            return merged
        if low_rank.embedding:
            return merged.mul_((self.magnitude / self.norms).view(1, -1))
        norms = torch.linalg.norm(merged, dim=1)
        return merged.mul_((self.magnitude[start:stop] / norms).view(-1, 1))

    def _product(self, low_rank: LowRank, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the product, not scaled."""
        b, a = (self.b, self.a[:, start:stop]) if low_rank.embedding else (self.b[start:stop], self.a)
        name = f"product {self.update.adapter}"
        product = torch.mm(b, a, out=scratch(name, (len(b), a.shape[1]), torch.float32, self.device))
        return product.T if low_rank.embedding else product

    def _column_norms(self, low_rank: LowRank) -> torch.Tensor:
        """DoRA on an embedding: the norm of each column of the adapted table, `(hidden_size,)`.

        A column runs over the whole vocabulary, so the table is read once for every block of columns.
        """
        source = self.update.source(self.base)
        num_rows, width = source.shape
        count = max(width // max(_NORM_BLOCK // num_rows, SMALLEST_PIECE_ROWS), 1)
        bounds = [width * index // count for index in range(count + 1)]
        norms = []
        for left, right in pairwise(bounds):
            block = torch.empty((num_rows, right - left), device=self.device)
            for start, stop in pieces(num_rows, width):
                block[start:stop] = source.read(start, stop)[:, left:right]
            product = (self.b[left:right] @ self.a).T.mul_(low_rank.scale)
            norms.append(torch.linalg.norm(block.T + product.T, dim=1))
        return torch.cat(norms)
