"""A row: one configuration and workload, with predicted and measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_vram.benchmark.configurations import By

Figure = float | int | None
# Figures that are both predicted and measured.
COMPARED = ("weights", "kv_cache", "peak", "process_total", "first_token_ms", "ms_per_token")
# Figures that are only measured.
MEASURED = (*COMPARED, "first_token_cold_ms", "ms_per_token_p90", "tokens_per_joule", "load_seconds")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """Predicted and measured figures of one configuration. A figure that is not known is `None`.

    Attributes:
        model: The model as it was named.
        configuration: The name of the configuration, such as `compact`.
        about: The configuration in words.
        by: The library that loaded the model.
        call: The call that repeats the load.
        prompt_len, max_new_tokens, batch_size: The workload.
        device: The GPU, or the CPU with its number of threads.
        on_cpu: The row ran on the CPU.
        versions: Versions of the libraries.
        date: The day of the measurement (ISO).
        predicted: Predicted figures by the names in `COMPARED`: bytes and milliseconds.
        measured: Measured figures by the names in `MEASURED`.
        promised: The most bytes that the plan of a session allows to the process; `None` without a plan, and on a CPU.
        rates: The machine of the predicted times, and whether its rates are measured or stated.
        error: The reason of a row that failed; `None` if it ran.
    """

    model: str
    configuration: str
    about: str
    by: By
    prompt_len: int
    max_new_tokens: int
    batch_size: int
    device: str
    on_cpu: bool
    versions: Mapping[str, str]
    date: str
    call: str | None = None
    predicted: Mapping[str, Figure] = field(default_factory=dict)
    measured: Mapping[str, Figure] = field(default_factory=dict)
    promised: int | None = None
    rates: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """The facts that make a measurement another one; a finished row with the same key is not run again."""
        work = (self.prompt_len, self.max_new_tokens, self.batch_size)
        return (self.model, self.configuration, *work, self.device, tuple(sorted(self.versions.items())))

    def deviation(self, figure: str) -> float | None:
        """Return the relative error of a prediction; `None` if one of the two figures is not known."""
        predicted, measured = self.predicted.get(figure), self.measured.get(figure)
        return None if predicted is None or not measured else predicted / measured - 1

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`."""
        return {
            **asdict(self),
            "predicted": {name: self.predicted.get(name) for name in COMPARED},
            "measured": {name: self.measured.get(name) for name in MEASURED},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BenchmarkRow:
        """Return the row of which `to_dict` gave `data`.

        Raises:
            TypeError, KeyError: a field is missing or unknown.
        """
        for name in ("predicted", "measured", "versions"):
            if not isinstance(data[name], dict):
                raise TypeError(f"{name} is not an object")
        return cls(**data)
