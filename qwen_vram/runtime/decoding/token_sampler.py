"""Sampling after a decode step, with a deferred check of the end.

Source of the order: transformers 5.17 and 5.23, generation/utils.py, `_sample` and `DeferredStopCheck`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokenSampler:
    """The growing sequences, in memory allocated once, and the other results that `generate` returns."""

    def __init__(self, processor: Any, criteria: Any, config: Any, input_ids: Tensor, *, left: int) -> None:
        batch, prompt = input_ids.shape
        self.processor, self.criteria, self.config = processor, criteria, config
        # The last token does not have to fit the cache, because it is never fed.
        most = prompt + left + 1
        self.limit = most if criteria.max_length is None else min(criteria.max_length, most)
        self.stops_at_limit = criteria.max_length is not None and criteria.max_length <= most
        self.ids = input_ids.new_empty((batch, self.limit))
        self.ids[:, :prompt] = input_ids
        self.length = prompt
        self.unfinished = torch.ones(batch, dtype=torch.int64, device=input_ids.device)
        self.pads = any(hasattr(one, "eos_token_id") for one in criteria)
        asked = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if asked and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if asked and config.output_logits else None

    @property
    def sequences(self) -> Tensor:
        """Prompts and the following tokens, (batch, tokens)."""
        return self.ids[:, : self.length]

    @property
    def full(self) -> bool:
        """True if the sequences have the maximum length that was asked for."""
        return self.stops_at_limit and self.length >= self.limit

    def next(self, logits: Tensor) -> Tensor:
        """Choose a token of each sequence, (batch,), from logits (batch, vocab_size), which may be overwritten."""
        if self.scores is not None or self.logits is not None:
            logits = logits.clone()
        scores = self.processor(self.sequences, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.pads:
            tokens = torch.where(self.unfinished.bool(), tokens, self.config._pad_token_tensor)
        self.ids[:, self.length] = tokens
        self.length += 1
        self.unfinished = self.unfinished & ~self.criteria(self.sequences, self.scores)
        return tokens

    def undo(self) -> None:
        """Remove the newest token."""
        self.length -= 1
        self.scores = self.scores[:-1] if self.scores else self.scores
        self.logits = self.logits[:-1] if self.logits else self.logits


class DeferredStop:
    """The deferred check if the step before the newest one was the last; it also hands tokens to a streamer."""

    def __init__(self, batch_size: int, device: torch.device, streamer: Any) -> None:
        self.streamer = streamer
        self.cuda = device.type == "cuda"
        self._sent = [self._slot(batch_size) for _ in range(2)]
        self._count = 0

    def put(self, unfinished: Tensor, tokens: Tensor) -> bool:
        """Send the newest step's result to the host, and tell if the step before was the last."""
        done, kept, event = self._sent[self._count % 2]
        done.copy_(unfinished.max() == 0, non_blocking=True)
        kept.copy_(tokens, non_blocking=True)
        if event is not None:
            event.record()
        self._count += 1
        return self._count > 1 and self._read(self._count - 2)

    def finish(self) -> None:
        """Stream the newest tokens too."""
        self._read(self._count - 1)

    def _read(self, number: int) -> bool:
        done, tokens, event = self._sent[number % 2]
        if event is not None:
            event.synchronize()
        if self.streamer is not None:
            self.streamer.put(tokens.clone())
        return bool(done)

    def _slot(self, batch_size: int) -> tuple[Tensor, Tensor, Any]:
        done = torch.empty((), dtype=torch.bool, pin_memory=self.cuda)
        tokens = torch.empty(batch_size, dtype=torch.int64, pin_memory=self.cuda)
        return done, tokens, torch.cuda.Event() if self.cuda else None  # type: ignore[no-untyped-call]
