"""Streams of tokens with log probabilities, of requests that were checked before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from qwen_vram.errors import WorkloadError
from qwen_vram.runtime.generation.answer_stream import Tee
from qwen_vram.runtime.generation.generations import Generations
from qwen_vram.runtime.generation.job_stream import JobStream
from qwen_vram.runtime.requests.prompts import Prompt

# The most alternatives of a token. Each is two numbers in host memory.
MAX_ALTERNATIVES = 100


class Token(NamedTuple):
    """A generated token.

    Attributes:
        id: Its number in the vocabulary.
        logprob: Its natural log probability, after penalties and before temperature, `top_k` and `top_p`; `None` if it
            was not asked for.
        top: The likeliest tokens at its position, with their log probabilities.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenStream(JobStream[Token]):
    """Iterator over the tokens of an answer while it is generated, as `JobStream` says; an end token is included.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        max_new_tokens: The most tokens of the answer.
    """

    def __init__(
        self,
        generations: Generations,
        model: Callable[[], Any],
        prompt: Prompt,
        *,
        logprobs: int | None = None,
        until: Callable[[Token], bool] | None = None,
    ) -> None:
        if logprobs is not None and (
            isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= MAX_ALTERNATIVES
        ):
            raise WorkloadError(
                f"logprobs must be None, or a whole number of alternatives from 0 to {MAX_ALTERNATIVES}, got "
                f"{logprobs!r}",
                name="logprobs",
                got=logprobs,
            )
        most = prompt.max_new_tokens
        self.prompt_tokens = int(prompt.inputs["input_ids"].shape[1])
        self.max_new_tokens = generations.plan.workload.max_new_tokens if most is None else most
        rows = None if logprobs is None else LogprobRows(logprobs)
        made = _Collector(rows, until)
        own = prompt.options.get("streamer")
        options = {
            **prompt.options,
            "streamer": made if own is None else Tee(own, made),
            "stopping_criteria": [*(prompt.options.get("stopping_criteria") or ()), EndedEarly(made)],
            "logits_processor": [*(prompt.options.get("logits_processor") or ()), *([] if rows is None else [rows])],
        }
        pieces = made.pieces
        job = generations.job(model, prompt.inputs, prompt.max_new_tokens, options, lambda: pieces.put(None))
        super().__init__(pieces, None, lambda: job)
        self._made = made
        self._ends = _end_tokens(model(), prompt)

    @property
    def finish_reason(self) -> str:
        """The reason for the end: `"length"` at the most tokens, otherwise `"stop"`; for a stream that was read."""
        made = self._made
        full = made.count >= self.max_new_tokens and not made.ended and made.last not in self._ends
        return "length" if full else "stop"

    def is_end(self, token: Token) -> bool:
        """Tell if a token ends an answer, so that it is not a part of the text."""
        return token.id in self._ends


class LogprobRows(LogitsProcessor):  # type: ignore[misc]
    """Logits of the newest steps, copied to host memory, until their tokens are known.

    On a GPU a token arrives one step late, so two rows are kept at most. The device allocates nothing for them.
    """

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._rows: deque[Tensor] = deque(maxlen=3)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (1, vocab_size) unchanged, and keep a copy."""
        self._rows.append(scores[0].to("cpu", copy=True))
        return scores

    def token(self, number: int) -> Token:
        """Return the token of the oldest kept step, with its log probabilities."""
        row = self._rows.popleft().float().log_softmax(dim=-1)
        values, ids = row.topk(min(self._alternatives, len(row)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(number, float(row[number]), top)


class _Collector(BaseStreamer):  # type: ignore[misc]
    """Streamer that puts tokens into a queue until the reader's `until` accepts one.

    Attributes:
        ended: `until` accepted a token; later ones are dropped.
        count: The number of tokens in the answer so far.
        last: The newest token's number.
    """

    def __init__(self, rows: LogprobRows | None, until: Callable[[Token], bool] | None) -> None:
        self.pieces: SimpleQueue[Token | None] = SimpleQueue()
        self.ended = False
        self.count = 0
        self.last = -1
        self._rows, self._until = rows, until
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        """Take token ids, those of the prompt first."""
        if self._in_prompt or self.ended:
            self._in_prompt = False
            return
        for number in value.flatten().tolist():
            token = Token(number) if self._rows is None else self._rows.token(number)
            self.count, self.last = self.count + 1, number
            self.pieces.put(token)
            if self._until is not None and self._until(token):
                self.ended = True

    def end(self) -> None:
        """Do nothing: the job tells its end."""


class EndedEarly(StoppingCriteria):  # type: ignore[misc]
    """Criterion that ends the generation after `until` accepted a token."""

    def __init__(self, made: _Collector) -> None:
        self._made = made

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """Return for each of the (batch, tokens) sequences if it ends now, (batch,)."""
        return torch.full((len(input_ids),), self._made.ended, dtype=torch.bool, device=input_ids.device)


def _end_tokens(model: Any, prompt: Prompt) -> frozenset[int]:
    chosen = prompt.options.get("eos_token_id", model.generation_config.eos_token_id)
    return frozenset([] if chosen is None else chosen if isinstance(chosen, list) else [chosen])
