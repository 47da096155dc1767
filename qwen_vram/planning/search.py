"""The search: candidates from a starting profile, least lossy first, held against a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.estimate import Estimate, estimate
from qwen_vram.arithmetic.model import stored_knobs
from qwen_vram.arithmetic.profile import Profile, resolve_profile
from qwen_vram.arithmetic.split import ONE_DEVICE, split_estimate
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.timing import decode_floor_ms
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.errors import DoesNotFitError
from qwen_vram.planning.budget import Budget
from qwen_vram.planning.split import balanced
from qwen_vram.units import format_gib

Prefer = Literal["quality", "speed", "memory"]

# Where the search begins: nothing lost, nothing expanded, nothing that grows.
_LOSSLESS = Profile(name="auto", attention="fused", cache="preallocated")


class Move(NamedTuple):
    """One step of the search: the knobs it turns, and what that costs."""

    knobs: dict[str, object]
    cost: str


# Least lossy first: what costs nothing, then precision, then speed. Each move builds on those before it.
_MOVES = (
    Move({"prefill_chunk_size": 4096}, "nothing lost: the same tokens, fed in chunks"),
    Move({"prefill_chunk_size": 2048}, "nothing lost: the same tokens, fed in chunks"),
    Move({"prefill_chunk_size": 1024}, "nothing lost: the same tokens, slightly slower prefill"),
    Move({"embeddings": "host"}, "nothing lost: rows are gathered on the host"),
    Move({"prefill_chunk_size": 512}, "nothing lost: the same tokens, slower prefill"),
    Move({"weights": "int8"}, "8-bit weights: close to lossless, slow"),
    Move({"weights": "nf4"}, "4-bit weights"),
    Move({"weights": "nf4", "lm_head": "nf4"}, "4-bit head"),
    Move({"kv_cache": "int8"}, "8-bit keys and values but for the newest 128 tokens"),
    Move({"kv_cache": "int4"}, "4-bit keys and values but for the newest 128 tokens"),
    Move({"kv_cache": "bf16", "kv_device": "host"}, "whole keys and values, brought over the link for every token"),
)


class Step(NamedTuple):
    """One candidate of the search: what was changed, what it needs, what it saved, and what it costs.

    `decode_floor_ms` is the least that its decode step can take, by bytes over bandwidth; no prediction.
    """

    change: str
    needed_bytes: int
    saved_bytes: int
    cost: str
    decode_floor_ms: float


class Candidate(NamedTuple):
    """What one step of the search came to, and every step up to it."""

    estimate: Estimate
    steps: tuple[Step, ...]


def search_space(
    architecture: Architecture, profile: str | Profile, workload: Workload, knobs: dict[str, object]
) -> tuple[Profile, tuple[Move, ...]]:
    """The profile to start from, and the moves that touch only what caller and checkpoint left open."""
    knobs = stored_knobs(architecture, knobs)
    if profile != "auto":
        return resolve_profile(profile, **knobs), ()
    start = replace(_LOSSLESS.replace(**knobs), name="auto")
    if architecture.tie_word_embeddings:
        knobs = {"lm_head": None, **knobs}  # the loader makes no head of its own for them
    return start, tuple(move for move in _MOVES if _is_open(move, start, workload, knobs))


def _is_open(move: Move, start: Profile, workload: Workload, knobs: dict[str, object]) -> bool:
    """Whether a move keeps what the caller chose, and can save: a chunk that the prompt does not fill cannot."""
    if any(knobs.get(knob, value) != value for knob, value in move.knobs.items()):
        return False
    if "kv_cache" in move.knobs and start.cache != "preallocated":
        return False
    chunk = move.knobs.get("prefill_chunk_size")
    return not isinstance(chunk, int) or chunk < workload.prompt_len


class Shortage(NamedTuple):
    """What a candidate needs and what is allowed, in words; the bytes of the device that is shortest; each GPU's."""

    needs: str
    allowed: str
    needed_bytes: int
    budget_bytes: int
    devices: dict[int, tuple[int, int]]


class Search:
    """One search over profiles for a model, a workload and a budget.

    Args:
        split: Layers of each of several GPUs where that is settled; otherwise every profile gets its own.
    """

    def __init__(
        self,
        label: str,
        architecture: Architecture,
        workload: Workload,
        budget: Budget,
        split: Mapping[int, int] | None = None,
    ) -> None:
        self.label = label
        self.architecture = architecture
        self.workload = workload
        self.budget = budget
        self.split = split

    def candidates(self, start: Profile, moves: tuple[Move, ...]) -> Iterator[Candidate]:
        """Every profile on the way that needs less than all before it, `start` first."""
        steps: tuple[Step, ...] = ()
        current, least = start, 0
        for move in (None, *moves):
            if self.several and move is not None and any(move.knobs.get(knob) for knob in ONE_DEVICE):
                continue
            profile = current if move is None else replace(current.replace(**move.knobs), name=start.name)
            result = self.estimate(profile, self.workload)
            needed = self.needed(result)
            if steps and needed >= least:
                continue  # it would cost something and save nothing
            saved = least - needed if steps else 0
            floor = decode_floor_ms(self.architecture, profile, self.workload)
            steps = (*steps, Step(_change(current, profile, move), needed, saved, _cost(profile, move), floor))
            current, least = profile, needed
            yield Candidate(result, steps)

    def run(self, start: Profile, moves: tuple[Move, ...], prefer: Prefer) -> Candidate:
        """The candidate that `prefer` asks for.

        Raises:
            DoesNotFitError: none fits.
        """
        fitting = []
        for candidate in self.candidates(start, moves):
            if self.fits(candidate.estimate):
                fitting.append(candidate)
                if prefer == "quality":
                    break
        if not fitting:
            raise self._refusal(candidate.estimate)
        if prefer == "memory":
            return fitting[-1]
        return min(fitting, key=lambda found: found.steps[-1].decode_floor_ms)

    @property
    def several(self) -> bool:
        """Whether the budget is of more GPUs than one."""
        return len(self.budget.devices) > 1

    def estimate(self, profile: Profile, workload: Workload) -> Estimate:
        """What `profile` takes, on one device or split over the budget's several."""
        if self.split:
            return split_estimate(self.label, self.architecture, profile, workload, self.split)
        if self.several:
            return balanced(self.label, self.architecture, profile, workload, self.budget.devices)
        return estimate(self.label, self.architecture, profile, workload)

    def by_device(self, result: Estimate) -> dict[int, tuple[int, int]]:
        """What each of several GPUs needs, and what it offers."""
        return {device: (part.needed_bytes, self.budget.devices[device]) for device, part in result.devices.items()}

    def needed(self, result: Estimate) -> int:
        """Bytes needed on what the plan runs on: the whole process on a GPU, weights and live tensors on the host."""
        if self.budget.vram is None:
            return result.weights + result.kv_cache + result.activations + result.host
        return result.needed_bytes

    def fits(self, result: Estimate) -> bool:
        """Whether both the device and the host hold it."""
        if self.budget.vram is None:
            return self.needed(result) <= self.budget.ram
        if self.several:
            each = self.by_device(result).values()
            return result.host <= self.budget.ram and all(need <= room for need, room in each)
        live = result.weights + result.kv_cache + result.tensors + result.workspace
        if live > self.budget.vram or result.host > self.budget.ram:
            return False  # without a replay, which takes most of an estimate's time
        return result.needed_bytes <= self.budget.vram

    def holds(self, profile: Profile, prompt_len: int, new: int, batch_size: int) -> bool:
        """Whether `profile` fits the budget at another workload."""
        workload = Workload(prompt_len=prompt_len, max_new_tokens=new, batch_size=batch_size)
        return self.fits(self.estimate(profile, workload))

    def longest_prompt(self, profile: Profile, new: int, batch_size: int) -> int:
        """The most prompt tokens that fit before `new` more, 0 where not even one does."""
        longest = self.architecture.max_position_embeddings - new
        return most(longest, lambda length: self.holds(profile, length, new, batch_size))

    def _refusal(self, smallest: Estimate) -> DoesNotFitError:
        """The error for a search that found nothing, with the longest prompt that the smallest profile holds."""
        nearest = self._nearest(smallest.profile)
        short, work = self.shortage(smallest), self.workload
        advice = (
            f"prompt_len={nearest.prompt_len} with max_new_tokens={nearest.max_new_tokens} and "
            f"batch_size={nearest.batch_size} would fit"
            if nearest
            else "not even one token would fit; use a smaller model"
        )
        return DoesNotFitError(
            f"{self.label} with {smallest.profile.weights} weights at {work.prompt_len} + {work.max_new_tokens} "
            f"tokens, batch {work.batch_size}, needs {short.needs}; {short.allowed} are allowed; {advice}",
            needed_bytes=short.needed_bytes,
            budget_bytes=short.budget_bytes,
            estimate=smallest,
            nearest=nearest,
            devices=short.devices,
        )

    def shortage(self, result: Estimate) -> Shortage:
        """What `result` needs beside what the budget offers."""
        devices = self.by_device(result)
        if devices:
            needed, offered = max(devices.values(), key=lambda pair: pair[0] / max(1, pair[1]))
            each = " and ".join(f"{format_gib(need)} on GPU {device}" for device, (need, _) in devices.items())
            allowed = " and ".join(format_gib(room) for _, room in devices.values())
            return Shortage(f"{each}, CUDA contexts included", allowed, needed, offered, devices)
        where, room = "on the GPU, CUDA context included", self.budget.vram
        if room is None:
            where, room = "of host memory", self.budget.ram
        return Shortage(f"{format_gib(self.needed(result))} {where}", format_gib(room), self.needed(result), room, {})

    def _nearest(self, profile: Profile) -> Workload | None:
        """The longest prompt that fits, with this workload's batch and new tokens, then with a batch of one."""
        for batch_size, new in ((self.workload.batch_size, self.workload.max_new_tokens), (1, 1)):
            longest = self.longest_prompt(profile, new, batch_size)
            if longest:
                return Workload(prompt_len=longest, max_new_tokens=new, batch_size=batch_size)
        return None


def most(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that holds, where every smaller one does; 0 where 1 does not.

    >>> most(100, lambda number: number <= 42)
    42
    """
    if limit > 0 and holds(limit):
        return limit
    low, high = 0, limit - 1
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return max(0, low)


def _change(before: Profile, candidate: Profile, move: Move | None) -> str:
    if move is None:
        return f"{candidate.weights} weights, {candidate.attention} attention, {candidate.cache} cache"
    turned = {knob: value for knob, value in move.knobs.items() if getattr(before, knob) != value}
    return ", ".join(f"{knob}={value!r}" for knob, value in turned.items())


def _cost(candidate: Profile, move: Move | None) -> str:
    if move is None:
        return "nothing lost" if FORMATS[candidate.weights].is_dense else f"{candidate.weights} weights"
    return move.cost
