"""Sampling from a seed, which borrows torch's generator for each draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Seeded:
    """Swap of the global generator's state: to this seed before `generate` draws a token, and back after it.

    `generate` accepts no generator. It calls logits processors before each draw, and stopping criteria after it. Random
    numbers that the caller draws between these do not change the answer, and the answer does not change them. torch has
    one generator for all threads: numbers that another thread draws in the same instant as a token are not kept apart.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own: Tensor | None = None
        self._callers: Tensor | None = None
        self._generator: torch.Generator | None = None

    def lend(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged, as a logits processor, and set the global generator to this seed's state."""
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
        """Restore the global generator, as a stopping criterion that stops none of the (batch, tokens) sequences."""
        self.end()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """Restore the global generator, if it is set to this seed's state."""
        if self._callers is not None and self._generator is not None:
            self._own = self._generator.get_state()
            self._generator.set_state(self._callers)
            self._callers = None
