"""The stopping criterion of a generation whose turn was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria

from qwen_vram.runtime.scheduling.clock import Clock
from qwen_vram.runtime.scheduling.turns import Turn


class StopOfTurn(StoppingCriteria):  # type: ignore[misc]
    """Criterion that ends a generation after the present token, or before the next chunk, if its turn is stopped.

    It is called after each token, and notes it in the clock.

    Attributes:
        obeyed: The generation ended, or ends with this token, because of this criterion.
    """

    def __init__(self, turn: Turn, prompt_len: int, clock: Clock) -> None:
        self.obeyed = False
        self._clock = clock
        self._turn = turn
        self._prompt_len = prompt_len
        self._answers: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return for each of the (batch, tokens) sequences if it ends now, (batch,)."""
        self._clock.token()
        stopped = bool(self._turn.stopped)
        if self._answers is None or stopped or len(self._answers) != len(input_ids):
            self._answers = torch.full((len(input_ids),), stopped, device=input_ids.device)
        self.obeyed = stopped
        return self._answers

    @contextmanager
    def before_chunks(self, model: Any) -> Iterator[None]:
        """Raise the error of a stopped turn from `model.generate` before a chunk of the prompt runs.

        Args:
            model: A `transformers` model, or a `PeftModel` of one.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model

        def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if self._turn.stopped and cache is not None and cache.get_seq_length() < self._prompt_len:
                self._turn.check()

        hook = base.register_forward_pre_hook(check, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
