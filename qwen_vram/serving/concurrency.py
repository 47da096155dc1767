"""Number of requests that a server runs at once, chosen by plans."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import qwen_vram as qv
from qwen_vram.planning.capacity.compiler import missing_compiler

AUTO = "auto"
# The most requests that `auto` chooses. Each has memory for a whole context, also while fewer requests run.
MOST = 16


class Served(NamedTuple):
    """The plan of a server.

    Attributes:
        plan: The plan.
        concurrency: The argument of `load` for it; `None` runs one request after the other.
        reason: The reason why `auto` chose no larger number, if there is one.
    """

    plan: qv.Plan
    concurrency: int | None
    reason: str = ""

    @property
    def lines(self) -> list[str]:
        """The lengths that requests may have, and the reason, in words."""
        longest = f"each of at most {self.plan.workload.context_len:,} tokens, prompt and answer together"
        said = "requests run one after the other" if self.concurrency is None else longest
        return [said, *([f"not {self.reason}"] if self.reason else [])]


def wanted(text: str) -> int | str:
    """Return the number of `--concurrency`, or `auto`.

    Raises:
        WorkloadError: it is neither.
    """
    if text == AUTO:
        return AUTO
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 7 and int(text)):
        raise qv.WorkloadError(
            f"--concurrency must be auto or a positive whole number of requests, got {text!r}",
            name="concurrency",
            got=text,
        )
    return int(text)


def plan_to_serve(model: str, concurrency: int | str, arguments: dict[str, Any]) -> Served:
    """Return the plan of a server.

    `auto` is the largest number up to 16 for which weights and head are stored as precisely as for one request. Keys
    and values of requests that run together are never quantized.

    Args:
        concurrency: A number, or `auto`.
        arguments: Those of `plan`.

    Raises:
        QwenVramError: as for `plan`.
    """
    if concurrency == 1:
        return Served(qv.plan(model, **arguments), None)
    if concurrency != AUTO:
        return Served(qv.plan(model, concurrency=int(concurrency), **arguments), int(concurrency))
    alone = qv.plan(model, **arguments)
    missing = "" if alone.on_cpu else missing_compiler()
    if missing:
        return Served(alone, None, f"several at once: they need Triton and a C compiler, and {missing} is missing")
    tried: dict[int, qv.Plan] = {}
    reasons: dict[int, str] = {}

    def refused(number: int) -> bool:
        try:
            found = qv.plan(model, concurrency=number, **arguments)
        except (qv.DoesNotFitError, qv.NotSupportedError, qv.WorkloadError) as error:
            reasons[number] = str(error)
        else:
            if _stored(found) == _stored(alone):
                tried[number] = found
                return False
            reasons[number] = f"{_said(found)} would be needed instead of {_said(alone)}"
        return True

    if not refused(MOST):
        return Served(tried[MOST], MOST)
    best = 1 + bisect_left(range(2, MOST), True, key=refused)
    reason = f"{best + 1} at once: {reasons[best + 1]}"
    return Served(alone, None, reason) if best == 1 else Served(tried[best], best, reason)


def _stored(plan: qv.Plan) -> tuple[str, str]:
    return plan.profile.weights, plan.profile.head_format


def _said(plan: qv.Plan) -> str:
    weights, head = _stored(plan)
    return f"{weights} weights" if weights == head else f"{weights} weights with a head in {head}"
