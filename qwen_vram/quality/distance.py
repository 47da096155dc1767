"""Distance of a model from its reference, with errors: KL divergence, top-1, perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_vram.quality.intervals import Figure
from qwen_vram.quality.verdict import Verdict, verdict

# Rows of logits that are compared at once, in float32.
_ROWS = 32
# Resamples of the bootstrap; the percentile interval of 95 % needs some hundred.
_RESAMPLES = 1_000
# The shares of the median, and of the 99th and 99.9th percentile.
_SHARES = (0.5, 0.99, 0.999)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Figures over all scored tokens, each with a 95 % interval.

    Attributes:
        documents: The number of documents.
        tokens: The number of scored tokens.
        mean_kl: The mean KL divergence of the model from the reference, in nats.
        median_kl, p99_kl, p999_kl: The median, and the 99th and 99.9th percentile.
        top_1: The share of tokens for which both models have the same likeliest token.
        perplexity_ratio: The model's perplexity over the reference's.
        reference_perplexity: The perplexity of the reference.
    """

    documents: int
    tokens: int
    mean_kl: Figure
    median_kl: Figure
    p99_kl: Figure
    p999_kl: Figure
    top_1: Figure
    perplexity_ratio: Figure
    reference_perplexity: Figure

    @property
    def verdict(self) -> Verdict:
        """The word for the mean KL divergence."""
        return verdict(self.mean_kl)

    def figures(self) -> dict[str, Figure]:
        """Return the figures by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Figure)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`."""
        figures = {name: one.to_dict() for name, one in self.figures().items()}
        return {"documents": self.documents, "tokens": self.tokens, **figures, "verdict": self.verdict}


@dataclass(frozen=True)
class Compared:
    """One document's tokens: KL divergence, agreement, and both models' negative log-likelihood."""

    kl: Tensor
    agrees: Tensor
    reference_loss: Tensor
    loss: Tensor


def compare(reference: Tensor, found: Tensor, targets: Tensor) -> Compared:
    """Compare two models' logits, (tokens, vocab_size), of one document whose tokens are `targets`."""
    parts = []
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        one = reference[rows].float().log_softmax(-1)
        other = found[rows].float().log_softmax(-1)
        # Rounding in float32 can make the sum of two equal distributions slightly negative.
        kl = (one.exp() * (one - other)).sum(-1).clamp_(min=0)
        wanted = targets[rows].unsqueeze(1)
        parts.append(
            (
                kl,
                (one.argmax(-1) == other.argmax(-1)).float(),
                -one.gather(1, wanted).squeeze(1),
                -other.gather(1, wanted).squeeze(1),
            )
        )
    return Compared(*(torch.cat(column) for column in zip(*parts, strict=True)))


def distance(documents: list[Compared]) -> Distance:
    """Return the figures of all documents.

    The intervals are those of a bootstrap that draws whole documents, because tokens of one document are not
    independent.
    """
    kl = [one.kl.double() for one in documents]
    tokens = torch.tensor([len(one) for one in kl])
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(documents), (_RESAMPLES, len(documents)), generator=generator)

    def means(of: list[Tensor]) -> tuple[Tensor, Tensor]:
        sums = torch.stack([one.double().sum() for one in of])
        return sums.sum() / tokens.sum(), sums[draws].sum(1) / tokens[draws].sum(1)

    def ratio(of: list[Tensor]) -> Figure:
        return _figure(*(one.exp() for one in means(of)))

    median, p99, p999 = _quantiles(kl, draws)
    return Distance(
        documents=len(documents),
        tokens=int(tokens.sum()),
        mean_kl=_figure(*means(kl)),
        median_kl=median,
        p99_kl=p99,
        p999_kl=p999,
        top_1=_figure(*means([one.agrees for one in documents])),
        perplexity_ratio=ratio([one.loss - one.reference_loss for one in documents]),
        reference_perplexity=ratio([one.reference_loss for one in documents]),
    )


def _figure(value: Tensor, resampled: Tensor) -> Figure:
    """Return a figure with the interval that holds 95 % of its resamples."""
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    # A percentile interval can leave out the value itself if there are few documents.
    return Figure(float(value), min(low, float(value)), max(high, float(value)))


def _quantiles(kl: list[Tensor], draws: Tensor) -> list[Figure]:
    """Return the figures of `_SHARES`, as `torch.quantile` interpolates them, without sorting each resample."""
    values, order = torch.cat(kl).sort()
    document = torch.cat([torch.full((len(one),), number) for number, one in enumerate(kl)])[order]
    # How often each document is drawn: the first row is the documents themselves.
    times = torch.stack([torch.bincount(draw, minlength=len(kl)) for draw in draws])
    times = torch.cat([torch.ones(1, len(kl), dtype=times.dtype), times])
    ranks = times[:, document].cumsum(1)
    figures = []
    for share in _SHARES:
        place = share * (ranks[:, -1:].double() - 1)
        lower, upper = (
            values[torch.searchsorted(ranks, one.long() + 1).squeeze(1)] for one in (place.floor(), place.ceil())
        )
        found = lower + (place.squeeze(1) % 1) * (upper - lower)
        figures.append(_figure(found[0], found[1:]))
    return figures
