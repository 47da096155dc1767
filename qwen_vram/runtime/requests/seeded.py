"""Sampling from a seed of its own: PyTorch's generator of random numbers is lent for the moment of each draw alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Seeded:
    """Swaps the state of the global generator in before `generate` draws a token, and out after it.

    `generate` takes no generator. It calls logits processors before each draw, and stopping criteria after it. Numbers
    that the caller draws meanwhile neither change the answer nor are changed by it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own: Tensor | None = None
        self._callers: Tensor | None = None
        self._generator: torch.Generator | None = None

    def lend(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor: the scores as they are; from here on the global generator is this seed's."""
        if self._callers is None:
            device = scores.device
            if self._generator is None:
                cuda = device.type == "cuda"
                self._generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
                self._own = torch.Generator(device).manual_seed(self._seed).get_state()
            assert self._own is not None
            self._callers = self._generator.get_state()
            self._generator.set_state(self._own)
        return scores

    def give_back(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """A stopping criterion, which stops none of the (batch, tokens) sequences."""
        self.end()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """Give the global generator back, if it is lent."""
        if self._callers is not None and self._generator is not None:
            self._own = self._generator.get_state()
            self._generator.set_state(self._callers)
            self._callers = None
