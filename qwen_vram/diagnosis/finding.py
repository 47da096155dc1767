"""A finding: one cause of lost memory or time, with its cost and its fix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen_vram.units import format_bytes

Severity = Literal["high", "medium", "low"]
SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low")

# Shares of a model's own bytes. Below the first nothing is reported; from the others on a finding is more severe.
LEAST_SHARE = 0.01
_MEDIUM_SHARE = 0.05
_HIGH_SHARE = 0.25
# Milliseconds for each token, or for a load, from which a finding is more severe.
_MEDIUM_MS = 1.0
_HIGH_MS = 10.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause of lost memory or time.

    Attributes:
        code: Its name, such as `"attention-eager"`; docs/doctor.md describes each.
        severity: `"high"`, `"medium"` or `"low"`.
        found: The state that was found.
        cost: The cost in words.
        fix: The change that removes it, in one line.
        cost_bytes: The cost in bytes; `None` if it is a time.
        cost_ms: The cost in milliseconds; `None` if it is memory.
    """

    code: str
    severity: Severity
    found: str
    cost: str
    fix: str
    cost_bytes: int | None = None
    cost_ms: float | None = None

    def __post_init__(self) -> None:
        """Refuse a finding without a figure."""
        if not self.cost_bytes and not self.cost_ms:
            raise ValueError(f"finding {self.code!r} has no figure; give cost_bytes or cost_ms")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`."""
        return asdict(self)


def of_bytes(code: str, nbytes: int, *, of: int, found: str, cost: str, fix: str) -> Finding:
    """Return a finding that costs bytes.

    Args:
        of: Bytes of which the cost is a share, for the severity.
        cost: The origin of the bytes; the amount is put before it.
    """
    share = nbytes / max(of, 1)
    severity: Severity = "high" if share >= _HIGH_SHARE else "medium" if share >= _MEDIUM_SHARE else "low"
    return Finding(
        code=code, severity=severity, found=found, cost=f"{format_bytes(nbytes)} {cost}", fix=fix, cost_bytes=nbytes
    )


def of_ms(code: str, ms: float, *, found: str, cost: str, fix: str) -> Finding:
    """Return a finding that costs milliseconds; the amount is put before `cost`."""
    severity: Severity = "high" if ms >= _HIGH_MS else "medium" if ms >= _MEDIUM_MS else "low"
    amount = f"{ms:,.1f}" if ms >= 1 else f"{ms:.3f}"
    return Finding(code=code, severity=severity, found=found, cost=f"{amount} ms {cost}", fix=fix, cost_ms=ms)
