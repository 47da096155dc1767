"""The batcher: runs requests together, from waiting to their last token.

A request waits until there are pages for its prompt and all of its new tokens. Its prompt is then fed, alone in chunks
or together with other short ones. After that each step feeds the newest token of every request. One round has one
forward pass of prompts and one step, so that no running request waits for a long prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from time import monotonic
from typing import Any, Protocol

import torch

from qwen_vram.arithmetic.batching import PACKED
from qwen_vram.errors import QwenVramError
from qwen_vram.runtime.attention.fused import NAME
from qwen_vram.runtime.batching.batch_step import BatchStep, Row
from qwen_vram.runtime.batching.choice import draw
from qwen_vram.runtime.batching.request import Request
from qwen_vram.runtime.generation.finite import explained
from qwen_vram.runtime.kv_cache.paged import PagedCache, PagePool, rows_of
from qwen_vram.runtime.scheduling.job import Job
from qwen_vram.runtime.scheduling.turns import Turn, Turns

# Seconds between two notes of the measured memory while requests run without a pause.
_KEPT_EVERY = 5.0
Within = Callable[[Callable[[Callable[[], None]], None]], None]


class Waiter(Protocol):
    """A receiver of the ends of requests."""

    def ended(self, request: Request) -> None:
        """Note that a request ended; called in the batch's thread."""


class Batcher:
    """The requests of one model, which run together in one turn.

    Args:
        model: A `transformers` model, or a `PeftModel` of one.
        most: The most requests that run at once.
        pool: The pages.
        chunk: The most tokens of a prompt in one forward pass; `None` is the whole prompt.
        tokens: The most tokens of several prompts in one forward pass.
        captured: As for `BatchStep`.

    Attributes:
        running: Requests that run now.
        waiting: Requests that wait for pages or for a place.
    """

    def __init__(
        self, model: Any, *, most: int, pool: PagePool, chunk: int | None, tokens: int, captured: bool
    ) -> None:
        self.model, self.pool, self._chunk, self._tokens, self.most = model, pool, chunk, tokens, most
        self._device = model.device
        self._packs = model.config._attn_implementation == NAME
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._step = BatchStep(base, most, pool, captured=captured)
        self._lock = Lock()
        self._new: deque[tuple[Request, Waiter]] = deque()
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._decoding: list[Request] = []
        self._waiters: dict[Request, Waiter] = {}
        self._loop: Job[None] | None = None

    @property
    def running(self) -> int:
        """Requests that have pages."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Requests that have no pages yet."""
        return len(self._waiting) + len(self._new)

    def submit(
        self,
        requests: Sequence[Request],
        waiter: Waiter,
        turns: Turns,
        within: Within,
    ) -> None:
        """Add requests, and start the turn that runs them if none runs. It does not wait.

        Args:
            within: Calls its argument with the limits and meters of a turn, and with a function that keeps what they
                measured so far.

        Raises:
            QwenVramError: the model is closed, or this thread runs its generations.
        """
        with self._lock:
            if self._loop is None:
                job: Job[None] = Job(turns, partial(self._run, within), self._device, lambda: self._over(job))
                job.start()
                self._loop = job
            self._new.extend((request, waiter) for request in requests)

    def close(self) -> None:
        """Release the steps, the pages and the model. No request runs."""
        self._step.close()
        self.model = self.pool = None  # type: ignore[assignment]

    def _over(self, job: Job[None]) -> None:
        """End the requests of a turn that failed, or that could not start in a closed model."""
        with self._lock:
            if self._loop is not job:  # it ended without requests
                return
            self._loop = None
            self._take_new()
            # A callback may ask again, and so start a turn that must not find these.
            left = self._all()
            self._waiting.clear()
            self._prefilling.clear()
            self._decoding.clear()
        error: BaseException = QwenVramError("the batch of requests ended; ask again")
        try:
            job.check()
        except BaseException as found:
            error = found
        for request in left:
            self._finish(request, error)

    def _run(self, within: Within, turn: Turn) -> None:
        """Run rounds until no request is left."""
        within(lambda keep: self._rounds(turn, keep))

    @torch.inference_mode()
    def _rounds(self, turn: Turn, keep: Callable[[], None]) -> None:
        kept = monotonic()
        while self._goes_on(turn):
            self._sweep()
            self._admit()
            self._prefill()
            self._decode()
            if monotonic() - kept > _KEPT_EVERY:
                keep()
                kept = monotonic()

    def _goes_on(self, turn: Turn) -> bool:
        """Take the new requests, and tell if any is left. A stopped turn ends them; later ones start another turn."""
        with self._lock:
            self._take_new()
            if self._waiters and not turn.stopped:
                return True
            self._loop = None
        for request in self._all():
            request.stopped = request.stopped or turn.stopped
        self._sweep()
        return False

    def _take_new(self) -> None:
        """Move new requests to the waiting ones, under the lock."""
        while self._new:
            request, waiter = self._new.popleft()
            self._waiters[request] = waiter
            self._waiting.append(request)

    def _all(self) -> tuple[Request, ...]:
        return (*self._waiting, *self._prefilling, *self._decoding)

    def _sweep(self) -> None:
        """End requests that were stopped, or whose deadline is over."""
        for request in self._all():
            error = request.must_end()
            if error is not None:
                self._finish(request, error)

    def _admit(self) -> None:
        """Give pages to waiting requests in their order, as long as there are enough."""
        while self._waiting and self.running < self.most:
            request = self._waiting[0]
            pages = self.pool.take(request.prompt_len + request.max_new_tokens)
            if pages is None:
                return
            self._waiting.popleft()
            request.pages = pages
            self._prefilling.append(request)
            try:
                request.rows = rows_of(pages, self._device)
                request.begin(self.model)
            except BaseException as error:  # the caller's streamer
                self._finish(request, error)

    def _prefill(self) -> None:
        """Feed one chunk of a long prompt, or some whole prompts together, up to the planned tokens of a step."""
        if not self._prefilling:
            return
        first = self._prefilling[0]
        count = min(self._chunk or first.prompt_len, first.prompt_len - first.fed)
        if count < first.prompt_len:
            if first.cache is None:
                assert first.rows is not None
                first.cache = PagedCache(self.pool, first.rows)
            logits = self._feed(first.tokens[first.fed : first.fed + count], first.cache, {"logits_to_keep": 1})
            fed = [first]
            first.fed += count
        else:
            fed = self._together()
            logits = self._feed_together(fed)
        if first.fed < first.prompt_len:
            return
        for request in fed:
            request.rows = request.cache = None
            self._prefilling.remove(request)
            self._decoding.append(request)
        highest, token = logits.max(dim=-1)
        likeliest = torch.stack([token, ((highest - highest) == 0).long()]).T.tolist()
        self._advance([(one, *found) for one, found in zip(fed, likeliest, strict=True)], logits)

    def _together(self) -> list[Request]:
        """Return the first prompts that one step feeds: whole ones, as far as they fit."""
        fed: list[Request] = []
        left = self._tokens
        for request in self._prefilling:
            whole = not request.fed and request.prompt_len <= (self._chunk or request.prompt_len)
            if fed and (not whole or request.prompt_len > left or len(fed) == (PACKED if self._packs else 1)):
                break
            left -= request.prompt_len
            fed.append(request)
        return fed

    def _feed_together(self, fed: Sequence[Request]) -> torch.Tensor:
        """Feed whole prompts, and return the logits of the last token of each, (requests, vocab_size)."""
        lengths = [request.prompt_len for request in fed]
        for request in fed:
            request.fed = request.prompt_len
        rows = torch.cat([request.rows[: request.prompt_len] for request in fed if request.rows is not None])
        cache, tokens = PagedCache(self.pool, rows), torch.cat([request.tokens for request in fed])
        if len(fed) == 1:
            return self._feed(tokens, cache, {"logits_to_keep": 1})
        ends = torch.tensor([0, *lengths]).cumsum(0).to(self.model.device)
        places = torch.cat([torch.arange(length) for length in lengths])[None].to(self.model.device)
        bounds = {"cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int()}
        most = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return self._feed(tokens, cache, {"position_ids": places, "logits_to_keep": ends[1:] - 1, **bounds, **most})

    def _feed(self, tokens: torch.Tensor, cache: PagedCache, options: dict[str, Any]) -> torch.Tensor:
        """Feed tokens, and return the logits that the options keep, in float32."""
        ids = tokens[None].to(self.model.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _decode(self) -> None:
        """Run one step of all requests whose prompts are fed."""
        running = list(self._decoding)
        if not running:
            return
        rows = [Row(one.newest, one.count, one.pages or ()) for one in running]
        likeliest = self._step(rows)
        self._advance([(one, *found) for one, found in zip(running, likeliest, strict=True)], self._step.logits)

    def _advance(self, rows: list[tuple[Request, int, bool]], logits: torch.Tensor) -> None:
        """Choose the next token of each request; rows of `logits` are in the order of the requests."""
        asked = []
        for row, (request, _, finite) in enumerate(rows):
            if not finite:
                self._finish(request, explained(self.model, request.tokens[None].to(self.model.device)))
            elif not request.choice.is_plain:
                asked.append((row, request.choice, request.tokens))
        drawn = draw(asked, logits)
        for row, (request, token, _) in enumerate(rows):
            error = drawn.errors.get(row)
            if error is not None:
                self._finish(request, error)
            elif not request.done:
                self._take(request, drawn.tokens.get(row, token))

    def _take(self, request: Request, token: int) -> None:
        try:
            if request.take(token):
                self._finish(request)
        except BaseException as error:  # the caller's streamer or criterion
            self._finish(request, error)

    def _finish(self, request: Request, error: BaseException | None = None) -> None:
        """End a request, give its pages back, and tell its waiter."""
        if request.done:
            return
        for place in (self._waiting, self._prefilling, self._decoding):
            if request in place:
                place.remove(request)
        if request.pages is not None:
            self.pool.give_back(request.pages)
            request.pages = None
        request.end(error)
        with self._lock:
            waiter = self._waiters.pop(request, None)
        if waiter is not None:
            waiter.ended(request)
