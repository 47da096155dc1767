"""The report of a merge: the share kept of the update in each module."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vram.units import format_bytes

# A module that keeps less than this share of its update is named in a warning.
ENOUGH = 0.9

_SHOWN = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """One merged tensor.

    Attributes:
        name: The tensor in the checkpoint.
        format: Its storage format, `"nf4"` or a dtype such as `"bf16"`.
        share: Share kept of the update, `<stored - base, update> / <update, update>`; `None` if the adapters change
            nothing, or cancel except for rounding.
        relative_size: Norm of the update over the norm of the base's weights; `None` if those are zero.
        largest_error: Largest difference of a stored weight from the merged one in float32. If the scales are quantized
            themselves, it is an upper bound, too high by at most the largest change of a scale.
    """

    name: str
    format: str
    share: float | None
    relative_size: float | None
    largest_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        adapters: Folder and weight of each.
        quantize: The format of the matrices; `None` if the base's dtypes were kept.
        modules: Every tensor that an adapter changed.
        untied: Tied embeddings became two different matrices.
        tokenizer: The folder of the tokenizer.
        total_bytes: Bytes of all tensors.
    """

    base: str
    adapters: tuple[tuple[str, float], ...]
    out: str
    quantize: str | None
    modules: tuple[ModuleReport, ...]
    vocab_size: int
    tie_word_embeddings: bool
    untied: bool
    tokenizer: str
    total_bytes: int
    files: tuple[str, ...]
    seconds: float

    @property
    def worst(self) -> tuple[ModuleReport, ...]:
        """Modules that keep less than 90 % of their update, the worst first."""
        found = [module for module in self.modules if module.share is not None and module.share < ENOUGH]
        return tuple(sorted(found, key=lambda module: module.share or 0.0))

    @property
    def share(self) -> float | None:
        """Share kept of the update, averaged over modules; `None` if nothing was changed."""
        kept = [module.share for module in self.modules if module.share is not None]
        return math.fsum(kept) / len(kept) if kept else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the text of merge_report.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def table(self) -> str:
        """Return a table with one line for each module."""
        return "\n".join([_head("module"), *(_line(module.name, module) for module in self.modules)])

    def __str__(self) -> str:
        """Return a summary and the table; for many modules, one line for each kind, and those that lost much."""
        share = "nothing to keep" if self.share is None else f"{self.share:.1%} of the update kept on average"
        first = f"{len(self.modules)} tensors merged into {self.out} ({format_bytes(self.total_bytes)}): {share}"
        if len(self.modules) <= _SHOWN:
            return f"{first}\n{self.table()}"
        lines = [_head("lowest share of each kind")]
        for kind in dict.fromkeys(_kind(module) for module in self.modules):
            same = [module for module in self.modules if _kind(module) == kind]
            lowest = min(same, key=lambda module: math.inf if module.share is None else module.share)
            lines.append(_line(f"{kind} x {len(same)}", lowest))
        lines += [_line(module.name, module) for module in self.worst[:_SHOWN]]
        return "\n".join([first, *lines])


def _kind(module: ModuleReport) -> str:
    """Return the tensor's name without the number of its layer."""
    return ".".join(part for part in module.name.split(".") if not part.isdigit())


def _head(first: str) -> str:
    return f"{first:48}{'format':>10}{'kept':>9}{'size':>10}{'largest error':>15}"


def _line(name: str, module: ModuleReport) -> str:
    share = "-" if module.share is None else f"{module.share:.1%}"
    size = "-" if module.relative_size is None else f"{module.relative_size:.2%}"
    return f"{name:48}{module.format:>10}{share:>9}{size:>10}{module.largest_error:>15.2e}"
