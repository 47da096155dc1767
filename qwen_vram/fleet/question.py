"""The question of a fleet plan, checked: model, users, lengths, and the users' wish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from qwen_vram.errors import NotSupportedError, WorkloadError
from qwen_vram.fleet.engines import Engine
from qwen_vram.fleet.simulation.lengths import Distribution
from qwen_vram.fleet.simulation.service import Wish
from qwen_vram.fleet.simulation.traffic import check_arrivals
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.cards.find import find_gpu
from qwen_vram.spec.cards.rows import Gpu

GpusLike = str | Sequence[str] | Mapping[str, int]


class Card(NamedTuple):
    """A card to compare: the most that there are (`None` is any number), and its price an hour (`None` if unknown)."""

    gpu: Gpu
    most: int | None
    price: float | None


class Question(NamedTuple):
    """The facts that the search needs.

    Attributes:
        users: Users whose requests are in the fleet at once, if they get exactly what they wish.
        rate: Requests a second of all users.
        arrivals: The times of the requests, instead of random ones at `rate`.
        slowdown: A factor of all predicted times.
    """

    label: str
    architecture: Architecture
    engine: Engine
    wish: Wish
    users: int
    rate: float
    prompts: Distribution
    answers: Distribution
    arrivals: tuple[float, ...] | None
    slowdown: float
    seed: int

    @property
    def longest(self) -> tuple[int, int]:
        """The longest prompt and the longest answer."""
        return self.prompts.most, self.answers.most

    @property
    def mean_tokens(self) -> float:
        """Tokens of the mean request."""
        return self.prompts.mean + self.answers.mean

    def to_dict(self) -> dict[str, Any]:
        """The question as plain data."""
        return {
            "concurrent_users": self.users,
            "requests_per_second": round(self.rate, 6),
            **self.wish._asdict(),
            "prompt_len": self.prompts.to_dict(),
            "max_new_tokens": self.answers.to_dict(),
            "arrivals": None if self.arrivals is None else len(self.arrivals),
            "slowdown": self.slowdown,
            "seed": self.seed,
        }


def cards_of(gpus: GpusLike, prices: Mapping[str, float] | None) -> tuple[Card, ...]:
    """Return the cards to compare.

    Raises:
        UnknownNameError: a card that is not in the table.
        WorkloadError: no card, a number of cards or a price that is not positive, or a card without a price.
    """
    if isinstance(gpus, str):
        gpus = [name.strip() for name in gpus.split(",")]
    names: dict[str, int | None] = dict(gpus) if isinstance(gpus, Mapping) else dict.fromkeys(gpus)
    if not names:
        raise WorkloadError(
            "gpus must name at least one GPU, got none; pass names such as ['L4', 'A100-80GB']", name="gpus", got=gpus
        )
    for name, most in names.items():
        if most is not None and (type(most) is not int or most < 1):
            raise WorkloadError(
                f"gpus[{name!r}] must be a positive number of GPUs, got {most!r}", name="gpus", got=most
            )
    paid = {find_gpu(name).name: price for name, price in (prices or {}).items()}
    for name, price in paid.items():
        positive("prices[" + repr(name) + "]", price)
    cards = tuple(Card(find_gpu(name), most, paid.get(find_gpu(name).name)) for name, most in names.items())
    missing = [card.gpu.name for card in cards if card.price is None]
    if paid and missing:
        raise WorkloadError(
            f"prices must have every GPU that is compared, got none of {', '.join(missing)}; add them, or leave prices "
            "out",
            name="prices",
            got=tuple(paid),
        )
    return cards


def positive(name: str, value: object) -> float:
    """Return a positive finite number.

    Raises:
        WorkloadError: it is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value <= 0:
        raise WorkloadError(f"{name} must be a positive number, got {value!r}", name=name, got=value)
    return float(value)


def wish_of(tokens_per_second: object, first_token_seconds: object, share: object) -> Wish:
    """Return the checked wish.

    Raises:
        WorkloadError: a rate or a time that is not positive, or a share that is not above 0 and at most 1.
    """
    wish = Wish(
        positive("tokens_per_second", tokens_per_second),
        positive("first_token_seconds", first_token_seconds),
        positive("share", share),
    )
    if wish.share > 1:
        raise WorkloadError(f"share must be at most 1, got {share!r}", name="share", got=share)
    return wish


def rate_of(users: object, arrivals: Sequence[float] | None, wish: Wish, answers: Distribution) -> float:
    """Return the requests a second.

    Each user sends a request, reads the answer at the wished rate, and sends the next one.

    Raises:
        WorkloadError: users or arrivals that are not valid.
    """
    if type(users) is not int or users < 1:
        raise WorkloadError(
            f"concurrent_users must be a positive whole number, got {users!r}", name="concurrent_users", got=users
        )
    if arrivals is not None:
        check_arrivals(arrivals)
        return len(arrivals) / max(arrivals[-1] - arrivals[0], 1e-9)
    return users / (wish.first_token_seconds + answers.mean / wish.tokens_per_second)


def sizes_asked(size: object, fitting: Sequence[int], gpus_per_node: int) -> list[int]:
    """Return the numbers of GPUs of one replica to compare.

    Raises:
        WorkloadError: a number that is not positive, or more than the GPUs of a machine.
    """
    for name, value in (("gpus_per_node", gpus_per_node), ("tensor_parallel", size)):
        if value is not None and (type(value) is not int or value < 1):
            raise WorkloadError(f"{name} must be a positive whole number, got {value!r}", name=name, got=value)
    if isinstance(size, int):
        if size > gpus_per_node:
            raise WorkloadError(
                f"tensor_parallel {size} is more than gpus_per_node {gpus_per_node}; a replica is on one machine, so "
                "choose at most that",
                name="tensor_parallel",
                got=size,
            )
        return [size]
    return [one for one in fitting if one <= gpus_per_node]


def undivided(engine: Engine, size: int | None) -> list[int]:
    """Return the only division of an engine that has each replica on one GPU.

    Raises:
        NotSupportedError: the caller asks for more.
    """
    if size not in (None, 1):
        raise NotSupportedError(
            f"engine {engine.name!r} has no tensor parallelism in this plan, got tensor_parallel={size}; leave it out, "
            "or use engine='vllm'",
            knob="tensor_parallel",
            value=size,
        )
    return [1]
