"""Refusals of a fleet plan in words, with the nearest plan that works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qwen_vram.errors import NotSupportedError, QwenVramError
from qwen_vram.fleet.errors import WishNotMetError
from qwen_vram.fleet.question import Question
from qwen_vram.fleet.replica import Replica
from qwen_vram.fleet.search import Found
from qwen_vram.fleet.simulation.service import Wish
from qwen_vram.planning.errors import DoesNotFitError
from qwen_vram.spec.cards.rows import Gpu
from qwen_vram.units import format_gib


class Failed(NamedTuple):
    """A replica of which no number fulfils the wish, with what was found."""

    replica: Replica
    found: Found


def closeness(failed: Failed) -> tuple[int, float, float]:
    """Return how near a replica is to the wish: by its users, its rate, and its time to the first token."""
    nearest = failed.found.nearest
    assert nearest is not None
    return failed.found.users, nearest.tokens_per_second, -nearest.first_token_seconds


def cards_text(replica: Replica, replicas: int) -> str:
    """Return the cards in words, such as `4 replicas of 2 x L4`."""
    each = f"{replica.size} x {replica.gpu.name}"
    return each if replicas == 1 else f"{replicas} replicas of {each}"


def wish_text(wish: Wish) -> str:
    """Return a wish in words."""
    seconds = wish.first_token_seconds
    first = f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
    return f"{wish.tokens_per_second:.1f} tokens/s and a first token within {first}"


def nearest_text(failed: Failed) -> str:
    """Return the most users of a replica in words, or the nearest wish that it fulfils."""
    found = failed.found
    assert found.nearest is not None
    if found.users:
        return f"{cards_text(failed.replica, found.tried)} fulfil it for {found.users:,} users"
    alone = "" if found.tried else " with no other request"
    who = f"{cards_text(failed.replica, max(1, found.tried))}{alone}"
    return f"{who} give {found.nearest.share:.0%} of the requests {wish_text(found.nearest)}"


def shortage(replica: Replica) -> str:
    """Return the bytes that a replica lacks in words."""
    return (
        f"a card of {cards_text(replica, 1)} needs {format_gib(replica.needed)} for one request of the longest lengths "
        f"({format_gib(replica.memory.weights)} of weights), and the engine takes {format_gib(replica.budget)}"
    )


def not_run(gpu: Gpu, formats: Sequence[str]) -> str:
    """Return the note for a card that runs none of the formats."""
    return f"{gpu.name} is left out: it does not run {', '.join(formats)} with this engine"


def not_met(question: Question, nearest: Failed) -> WishNotMetError:
    """Return the error for a wish that no fleet fulfils."""
    assert nearest.found.nearest is not None
    return WishNotMetError(
        f"no fleet of these GPUs gives {question.wish.share:.0%} of the requests of {question.label} "
        f"{wish_text(question.wish)}; with {nearest.replica.weights} weights {nearest_text(nearest)}; ask for that, or "
        "name more or faster GPUs",
        wish=question.wish,
        nearest=nearest.found.nearest,
        gpu=nearest.replica.gpu.name,
        weights=nearest.replica.weights,
        tensor_parallel=nearest.replica.size,
        replicas=nearest.found.tried,
        users=nearest.found.users,
    )


def does_not_fit(
    question: Question, small: Sequence[Replica], names: Sequence[str], formats: Sequence[str]
) -> QwenVramError:
    """Return the error for a model that fits on no card, with the bytes of the nearest one."""
    if not small:
        return NotSupportedError(
            f"{', '.join(names)} do not run {', '.join(formats)} with engine {question.engine.name!r}; choose another "
            "format, or a card of compute capability 8.0 or newer",
            knob="weights",
            value=tuple(formats),
        )
    nearest = min(small, key=lambda replica: replica.needed - replica.budget)
    advice = "shorten the lengths, choose weights with fewer bits, or name larger GPUs"
    return DoesNotFitError(
        f"{question.label} fits on none of {', '.join(names)}: with {nearest.weights} weights {shortage(nearest)}; "
        f"{advice}",
        needed_bytes=nearest.needed,
        budget_bytes=nearest.budget,
        estimate=nearest.estimate,
        nearest=None,
    )
