"""The strategy interface of a merged weight's format: what is stored, and how a piece of rows becomes that."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch


class Part(NamedTuple):
    """One stored tensor of a weight: the end of its name, its dtype and shape; no shape where bytes come out last."""

    ending: str
    kind: str
    shape: tuple[int, ...] | None


class Codec(Protocol):
    """How a matrix is stored.

    Attributes:
        bits: Code bits per weight.
        group_size: Weights that share a scale; 0 where a row does.
        scales_wait: Whether scales are final only when those of the whole tensor are known.
    """

    bits: int
    group_size: int
    scales_wait: bool

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """What is stored for a weight of `shape`, codes first."""

    def row_step(self, columns: int) -> int:
        """Rows that a piece must be a multiple of."""

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of some rows, `(rows, columns)` in the checkpoint's dtype."""

    def finish(
        self, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The tensors beside the codes, by the end of their name, and the scales as they will be read back."""

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Some rows in float32, as the quantized model computes with them."""

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """config.json's `quantization_config`."""
