"""One caller's call in a batch: a `Job` of one or several requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Event, Lock

import torch
from torch import Tensor

from qwen_vram.runtime.batching.batcher import Batcher, Within
from qwen_vram.runtime.batching.request import Request
from qwen_vram.runtime.memory.release import forget_frames
from qwen_vram.runtime.scheduling.job import Job
from qwen_vram.runtime.scheduling.turns import LOOK_SECONDS, Turns

_PATIENCE_SECONDS = 10.0


class BatchJob(Job[Tensor]):
    """The generation of one or several sequences in a batch; its result is prompts and answers, (sequences, tokens).

    Args:
        batcher: The batcher of the model.
        requests: The sequences.
        inputs: The caller's `input_ids` with their padding, (prompts, tokens).
        pad: The token after the end of a shorter answer.
        within: As for `Batcher.submit`.
        answered: Called with the requests when the last one has ended without an error, before the result is ready.
        ended: Called after the end.
    """

    def __init__(
        self,
        batcher: Batcher,
        requests: Sequence[Request],
        inputs: Mapping[str, Tensor],
        pad: int,
        turns: Turns,
        within: Within,
        *,
        answered: Callable[[Sequence[Request]], object] | None = None,
        ended: Callable[[], object] | None = None,
    ) -> None:
        self._batcher, self._requests, self._inputs, self._pad = batcher, tuple(requests), inputs, pad
        self._turns, self._within, self._answered, self._ended = turns, within, answered, ended
        self._left, self._lock = len(requests), Lock()
        self._over = Event()
        self._checked = False

    def start(self) -> None:
        """Put the requests into the queue.

        Raises:
            QwenVramError: this thread runs a generation of the model, which would wait for itself.
        """
        self._turns.refuse_inside("another generation cannot start")
        self._batcher.submit(self._requests, self, self._turns, self._within)

    def result(self) -> Tensor:
        """Return prompts and answers, or raise the error of a sequence. An interrupt of this wait stops all."""
        try:
            while not self._over.wait(LOOK_SECONDS):
                pass
        except BaseException:
            self.stop("was stopped by an interrupt of its caller")
            self._over.wait(_PATIENCE_SECONDS)
            raise
        self.check()
        prompts = self._inputs["input_ids"]
        times = len(self._requests) // len(prompts)
        most = max(one.new_tokens for one in self._requests)
        result = torch.full((len(self._requests), prompts.shape[1] + most), self._pad, dtype=torch.long)
        result[:, : prompts.shape[1]] = prompts.repeat_interleave(times, dim=0)
        for row, one in zip(result, self._requests, strict=True):
            row[prompts.shape[1] : prompts.shape[1] + one.new_tokens] = one.tokens[one.prompt_len :]
        return result

    def check(self) -> None:
        """Raise the error of a sequence, once."""
        if not self._checked:
            self._checked = True
            error = next((one.error for one in self._requests if one.error is not None), None)
            if error is not None:
                forget_frames(error)
                raise error

    def stop(self, why: str) -> None:
        """Stop all sequences at their next token."""
        for one in self._requests:
            one.stopped = one.stopped or why

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of a started job; the batch's own thread does not wait for itself."""
        if not self._turns.is_inside():
            self._over.wait(timeout)

    def ended(self, request: Request) -> None:
        """Note the end of a sequence; called in the batch's thread. An error stops the others."""
        if request.error is not None:
            self.stop("was stopped by an error of another sequence of its batch")
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            if self._answered is not None and all(one.error is None for one in self._requests):
                self._answered(self._requests)
            self._over.set()
            if self._ended is not None:
                self._ended()
