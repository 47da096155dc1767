"""Options of a fleet: the best division of each card and format, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen_vram.fleet.data import FleetOption
from qwen_vram.fleet.engines import runs_on
from qwen_vram.fleet.question import Card, Question
from qwen_vram.fleet.refusals import Failed, closeness, does_not_fit, nearest_text, not_met, not_run, shortage
from qwen_vram.fleet.replica import Replica, make_replica
from qwen_vram.fleet.search import fewest_replicas, mean_replicas


class Options:
    """The search over cards, formats and divisions, with what it leaves out.

    Attributes:
        notes: A line for each card and format that is left out.
        small: For each of these that does not fit, the largest replica.
        failed: For each of these that does not fulfil the wish, the nearest replica.
    """

    def __init__(self, question: Question, cards: Sequence[Card], formats: Sequence[str], sizes: Sequence[int]) -> None:
        self.question, self.cards, self.formats, self.sizes = question, cards, formats, sizes
        self.notes: list[str] = []
        self.small: list[Replica] = []
        self.failed: list[Failed] = []

    def all(self) -> Iterator[FleetOption]:
        """Yield the best division of each card and format that fulfils the wish."""
        engine, architecture = self.question.engine, self.question.architecture
        for card in self.cards:
            formats = [name for name in self.formats if runs_on(engine, name, card.gpu, architecture)]
            if not formats:
                self.notes.append(not_run(card.gpu, self.formats))
            for weights in formats:
                best = self._best(card, weights)
                if best is not None:
                    yield best

    def refusal(self) -> Exception:
        """Return the error for a search that finds nothing."""
        if self.failed:
            return not_met(self.question, max(self.failed, key=closeness))
        return does_not_fit(self.question, self.small, [card.gpu.name for card in self.cards], self.formats)

    def _best(self, card: Card, weights: str) -> FleetOption | None:
        """Return the division with the fewest GPUs, or `None` with a note."""
        replicas = list(self._replicas(card, weights))
        fitting = [replica for replica in replicas if replica.fits]
        if not fitting:
            self.small.append(replicas[-1])
            self.notes.append(f"{card.gpu.name} with {weights} is left out: {shortage(replicas[-1])}")
            return None
        fitting.sort(key=lambda replica: mean_replicas(self.question, replica) * replica.size)
        best: FleetOption | None = None
        failed: list[Failed] = []
        for replica in fitting:
            enough = None if best is None else -(-best.gpus // replica.size)
            most = None if card.most is None else card.most // replica.size
            found = fewest_replicas(self.question, replica, most, enough)
            if found is not None and found.nearest is not None:
                failed.append(Failed(replica, found))
            elif found is not None and (best is None or found.replicas * replica.size < best.gpus):
                best = FleetOption.of(replica, found.replicas, found.service, card.price)
        if best is None:
            nearest = max(failed, key=closeness)
            self.failed.append(nearest)
            self.notes.append(f"{card.gpu.name} with {weights} is left out: {nearest_text(nearest)}")
        return best

    def _replicas(self, card: Card, weights: str) -> Iterator[Replica]:
        """Yield the replica of each division that the card's number allows; at least the smallest."""
        for size in self.sizes:
            if card.most is None or size <= card.most or size == self.sizes[0]:
                yield make_replica(
                    self.question.label,
                    self.question.architecture,
                    self.question.engine,
                    card.gpu,
                    weights,
                    size,
                    longest=self.question.longest,
                    mean_tokens=self.question.mean_tokens,
                    sequences=self.question.engine.sequences,
                    step_tokens=self.question.engine.step_tokens,
                    slowdown=self.question.slowdown,
                )
