"""The interface of a storage format for merged weights."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch


class Part(NamedTuple):
    """One stored tensor of a weight: the end of its name, its dtype and its shape; `None` if its size is known last."""

    ending: str
    kind: str
    shape: tuple[int, ...] | None


class Codec(Protocol):
    """A storage format of matrices.

    Attributes:
        bits: Code bits per weight.
        group_size: Weights that share a scale; 0 if a whole row does.
        scales_wait: Scales are final only when those of the whole tensor are known.
    """

    bits: int
    group_size: int
    scales_wait: bool

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Return the stored tensors of a weight of `shape`, codes first."""

    def row_step(self, columns: int) -> int:
        """Return the number of rows that a piece must be a multiple of."""

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales of some rows, `(rows, columns)` in the checkpoint's dtype."""

    def finish(
        self, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the tensors beside the codes, by the end of their name, and the scales as they are read back."""

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return some rows in float32, as the quantized model computes with them."""

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the `quantization_config` for config.json."""
