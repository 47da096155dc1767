"""Choice of the next tokens of a batch, by the settings of each request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_vram.arithmetic.batching import DRAWN_TOGETHER
from qwen_vram.runtime.generation.watched import REFUSED, in_generate, refusal

# Processors of `transformers` that treat each row alone and do not read its tokens.
_OF_ROWS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class Choice:
    """The choice of one request's next token from its logits.

    Args:
        processors: Processors of `transformers` and of the caller, in order.
        sample: Draw a token; otherwise take the likeliest.
        seed: The seed of its draws; `None` for torch's own generator.
        place: The number of its sequence in its call, and the number of these sequences. With a seed each sequence has
            the draws that it would have in a batch of them.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        *,
        sample: bool,
        seed: int | None,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self._processors = processors
        self._sample = sample
        self._seed = seed
        self._place = place
        self._generator: torch.Generator | None = None

    @property
    def is_plain(self) -> bool:
        """Tell if the likeliest token of the unchanged logits is taken."""
        return not self._sample and not self._processors

    @property
    def group(self) -> Hashable:
        """Requests with equal groups can be processed together; `None` for a request that is processed alone."""
        if not self._sample or not all(type(one) in _OF_ROWS for one in self._processors):
            return None
        return tuple((type(one).__name__, *sorted(vars(one).items())) for one in self._processors)

    def scores(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Return the processed scores of rows (rows, vocab_size).

        Args:
            tokens: Those of the request on the host, (tokens,), which are read if it is processed alone.
        """
        alone = self.group is None and bool(self._processors)
        ids = tokens[None].to(logits.device) if alone else tokens
        scores: Tensor = self._processors(ids, logits)
        return scores

    def taken(self, scores: Tensor) -> Tensor:
        """Return the token of one row of scores, (1, vocab_size), as (1,)."""
        if not self._sample:
            return scores.argmax(dim=-1)
        if self._seed is not None and self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        shares, (number, sequences) = scores.softmax(dim=-1), self._place
        if self._generator is None or sequences == 1:
            return torch.multinomial(shares, 1, generator=self._generator)[:, 0]
        return torch.multinomial(shares.repeat(sequences, 1), 1, generator=self._generator)[number]

    @property
    def has_seed(self) -> bool:
        """Tell if the draws are those of its own seed."""
        return self._seed is not None


# The row of a request, its choice, and its tokens so far on the host, (tokens,).
Asked = tuple[int, Choice, Tensor]


class Drawn:
    """The next tokens of some requests.

    Attributes:
        tokens: The token of each request, by its row.
        errors: The error of a request's own processor, by its row.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.errors: dict[int, BaseException] = {}


def draw(asked: Sequence[Asked], logits: Tensor) -> Drawn:
    """Choose tokens from logits, (rows, vocab_size) in float32, which stay unchanged."""
    drawn = Drawn()
    groups: defaultdict[Hashable, list[Asked]] = defaultdict(list)
    for place, one in enumerate(asked):
        group = one[1].group
        groups[("alone", place) if group is None else group].append(one)
    found: list[tuple[list[int], Tensor]] = []
    for members in groups.values():
        for start in range(0, len(members), DRAWN_TOGETHER):
            part = members[start : start + DRAWN_TOGETHER]
            rows = [row for row, _, _ in part]
            try:
                found.append((rows, _of_group(part, logits)))
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                refused = isinstance(error, REFUSED) and in_generate(error)
                drawn.errors.update(dict.fromkeys(rows, refusal(error, ()) if refused else error))
    if found:
        numbers = torch.cat([tokens for _, tokens in found]).tolist()
        every = [row for rows, _ in found for row in rows]
        drawn.tokens.update(zip(every, numbers, strict=True))
    return drawn


def _of_group(part: Sequence[Asked], logits: Tensor) -> Tensor:
    """Return the tokens of requests with equal settings, (requests,)."""
    _, first, tokens = part[0]
    scores = first.scores(tokens, logits[[row for row, _, _ in part]])
    if len(part) > 1 and not any(choice.has_seed for _, choice, _ in part):
        return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]
    return torch.cat([choice.taken(scores[number : number + 1]) for number, (_, choice, _) in enumerate(part)])
