"""Token embeddings in host memory, from which only the needed rows are copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class HostEmbedding(nn.Module):
    """Embedding that looks tokens up on the host and copies (batch, tokens, hidden_size) to `device`.

    The matrix is not a parameter of the module, because `transformers` takes a model's device from its first parameter,
    and accelerate moves parameters. `state_dict()` includes it.
    """

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        self._table = [weight.detach()]
        self.device = device
        self.num_embeddings, self.embedding_dim = weight.shape

    @property
    def weight(self) -> Tensor:
        """The matrix, (vocab_size, hidden_size), on the host."""
        return self._table[0]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows of `input_ids`, on the device."""
        rows = nn.functional.embedding(input_ids.to("cpu"), self.weight)
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def extra_repr(self) -> str:
        """Return sizes and device, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, host -> {self.device}"


def move_embedding_to_host(model: nn.Module, device: torch.device) -> None:
    """Replace the model's token embeddings by `HostEmbedding`, with the matrix on the host."""
    table = model.get_input_embeddings().weight.data  # type: ignore[operator]
    model.set_input_embeddings(HostEmbedding(table.to("cpu"), device))  # type: ignore[operator]
