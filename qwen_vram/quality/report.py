"""`QualityReport`: the distance and the answers of one model, as text and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_vram.quality.answers.ask import Answers
from qwen_vram.quality.distance import Distance


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """The result of `check()`.

    Attributes:
        model: The model as it was named.
        settings: The knobs that the model was loaded with.
        reference: The reference as it was named; `None` without a distance.
        reference_settings: The knobs that the reference was loaded with; `None` if its logits were stored before.
        seed: The seed of questions and documents.
        tasks: `general`, or `demo` for the bundled model.
        device: The GPU, or the CPU.
        versions: Versions of the libraries.
        date: The day of the measurement (ISO).
        distance: The distance; `None` if it was not asked for.
        questions: The answers; `None` if they were not asked for.
    """

    model: str
    settings: Mapping[str, Any]
    reference: str | None
    reference_settings: Mapping[str, Any] | None
    seed: int
    tasks: str
    device: str
    versions: Mapping[str, str]
    date: str
    distance: Distance | None = None
    questions: Answers | None = None

    @property
    def is_good(self) -> bool:
        """Tell if the distance is not `poor`; without a distance, if one answer or more is right."""
        if self.distance is not None:
            return self.distance.verdict != "poor"
        return self.questions is None or self.questions.counts()["total"][0] > 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("distance", "questions")},
            "is_good": self.is_good,
            "distance": None if self.distance is None else self.distance.to_dict(),
            "questions": None if self.questions is None else self.questions.to_dict(),
        }

    def __str__(self) -> str:
        weights, kv_cache = self.settings["weights"], self.settings["kv_cache"]
        lines = [f"{self.model} | {weights} weights, {kv_cache} KV cache | seed {self.seed} | {self.device}"]
        if self.distance is not None:
            lines += ["", *self._distance_lines(self.distance)]
        if self.questions is not None:
            lines += ["", *self._question_lines(self.questions)]
        return "\n".join(lines)

    def _distance_lines(self, found: Distance) -> list[str]:
        lines = [
            f"distance from {self.reference}: {found.verdict}",
            f"{found.tokens:,} tokens of {found.documents} documents; 95 % intervals",
        ]
        for name, one in found.figures().items():
            lines.append(f"  {name:21}{one.value:12.6f}   [{one.low:.6f}, {one.high:.6f}]")
        return lines

    def _question_lines(self, found: Answers) -> list[str]:
        lines = [f"questions ({self.tasks}): right of asked, 95 % intervals"]
        counts = found.counts()
        for name, one in found.shares().items():
            right, asked = counts[name]
            lines.append(f"  {name:9}{right:4} of {asked:<4}{one.value:7.1%}   [{one.low:.1%}, {one.high:.1%}]")
        return lines
