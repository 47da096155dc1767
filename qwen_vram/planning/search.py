"""The search: candidates from a starting profile, least lossy first, held against a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.estimate import Estimate, estimate
from qwen_vram.arithmetic.model import stored_knobs
from qwen_vram.arithmetic.profile import Profile, resolve_profile
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.timing import decode_floor_ms
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.errors import DoesNotFitError
from qwen_vram.planning.budget import Budget
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
    Move({"dequantization": "tiled"}, "nothing lost: 4-bit matrices are dequantized tile by tile"),
    Move({"weights": "int8"}, "8-bit weights: close to lossless, slow"),
    Move({"weights": "nf4", "dequantization": "tiled"}, "4-bit weights"),
    Move({"weights": "nf4", "lm_head": "nf4"}, "4-bit head"),
    # A tied head in 4 bits is a copy, which saves something once the table can leave.
    Move({"weights": "nf4", "lm_head": "nf4", "embeddings": "host"}, "4-bit head, rows are gathered on the host"),
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


def _search_space(
    architecture: Architecture, profile: str | Profile, workload: Workload, knobs: dict[str, object]
) -> tuple[Profile, tuple[Move, ...]]:
    """The profile to start from, and the moves that touch only what caller and checkpoint left open."""
    knobs = stored_knobs(architecture, knobs)
    if profile != "auto":
        return resolve_profile(profile, **knobs), ()
    start = replace(_LOSSLESS.replace(**knobs), name="auto")
    stream = Move({"streamed_layers": architecture.num_hidden_layers}, "layers cross the link for every token")
    return start, tuple(move for move in (*_MOVES, stream) if _is_open(move, start, workload, knobs))


def _is_open(move: Move, start: Profile, workload: Workload, knobs: dict[str, object]) -> bool:
    """Whether a move keeps what the caller chose, and can save: a chunk that the prompt does not fill cannot."""
    if any(knobs.get(knob, value) != value for knob, value in move.knobs.items()):
        return False
    if "kv_cache" in move.knobs and start.cache != "preallocated":
        return False
    if "streamed_layers" in move.knobs and start.compiled:
        return False
    chunk = move.knobs.get("prefill_chunk_size")
    return not isinstance(chunk, int) or chunk < workload.prompt_len


class Search:
    """One search over profiles for a model, a workload and a budget; profile and knobs as for `plan`."""

    def __init__(
        self,
        label: str,
        architecture: Architecture,
        workload: Workload,
        budget: Budget,
        profile: str | Profile,
        knobs: dict[str, object],
    ) -> None:
        self.label = label
        self.architecture = architecture
        self.workload = workload
        self.budget = budget
        self.start, self.moves = _search_space(architecture, profile, workload, knobs)

    def candidates(self) -> Iterator[Candidate]:
        """Every profile on the way that needs less than all before it."""
        steps: tuple[Step, ...] = ()
        current, least = self.start, 0
        for move in (None, *self.moves):
            profile = current if move is None else replace(current.replace(**move.knobs), name=current.name)
            result = estimate(self.label, self.architecture, profile, self.workload)
            needed = self.needed(result)
            if steps and needed >= least:
                continue  # it would cost something and save nothing
            saved = least - needed if steps else 0
            change, cost = _change(current, profile, move), _cost(profile, move)
            steps = (*steps, Step(change, needed, saved, cost, self._floor(profile)))
            current, least = profile, needed
            yield Candidate(result, steps)

    def run(self, prefer: Prefer) -> Candidate:
        """The candidate that `prefer` asks for. Layers are streamed only where nothing else fits.

        Raises:
            DoesNotFitError: none fits.
        """
        fitting: list[Candidate] = []
        for candidate in self.candidates():
            streams = self._may_stream(candidate.estimate.profile)
            if streams and fitting:
                break
            found = self._fewest_streamed(candidate) if streams else candidate
            if found and self.fits(found.estimate):
                fitting.append(found)
                if prefer == "quality":
                    break
        if not fitting:
            raise self._refusal(candidate.estimate)
        if prefer == "memory":
            return fitting[-1]
        return min(fitting, key=lambda found: found.steps[-1].decode_floor_ms)

    def _fewest_streamed(self, everything: Candidate) -> Candidate | None:
        """A candidate that streams all layers, with as few of them as fit; `None` where not even all do.

        The cache goes back to where it was at the start, or stays where the moves have brought it: whole rather than
        quantized, then what makes the shorter step.
        """
        *before, last = everything.steps
        start, moved = self.start, everything.estimate.profile
        bases = (replace(moved, kv_cache=start.kv_cache, kv_device=start.kv_device), moved)
        tried = [self._resident_first(base, self.workload) for base in bases]
        fitting = [result for result in tried if self.fits(result)]
        if not fitting:
            return None
        best = min(fitting, key=lambda found: (found.profile.kv_cache != start.kv_cache, self._floor(found.profile)))
        knobs = {knob: getattr(best.profile, knob) for knob in ("streamed_layers", "kv_cache", "kv_device")}
        change = _change(replace(moved, streamed_layers=0), best.profile, Move(knobs, ""))
        needed = self.needed(best)
        step = Step(change, needed, before[-1].needed_bytes - needed, last.cost, self._floor(best.profile))
        return Candidate(best, (*before, step))

    def _may_stream(self, profile: Profile) -> bool:
        """Whether the search, not the caller, streams layers in `profile`."""
        return profile.streamed_layers > self.start.streamed_layers

    def _resident_first(self, base: Profile, workload: Workload) -> Estimate:
        """`base` with as many of its streamed layers on the device as that holds."""

        def streaming(layers: int) -> Estimate:
            return estimate(self.label, self.architecture, replace(base, streamed_layers=layers), workload)

        layers = base.streamed_layers
        return streaming(layers - most(layers, lambda resident: self._on_device(streaming(layers - resident))))

    def _floor(self, profile: Profile) -> float:
        return decode_floor_ms(self.architecture, profile, self.workload)

    def needed(self, result: Estimate) -> int:
        """Bytes needed on what the plan runs on: the whole process on a GPU, weights and live tensors on the host."""
        if self.budget.vram is None:
            return result.weights + result.kv_cache + result.activations + result.host
        return result.needed_bytes

    def fits(self, result: Estimate) -> bool:
        """Whether both the device and the host hold it."""
        if self.budget.vram is None:
            return self.needed(result) <= self.budget.ram
        return result.host <= self.budget.ram and self._on_device(result)

    def _on_device(self, result: Estimate) -> bool:
        assert self.budget.vram is not None
        live = result.weights + result.kv_cache + result.tensors + result.workspace
        # Most are refused without a replay, which takes most of an estimate's time.
        return live <= self.budget.vram and result.needed_bytes <= self.budget.vram

    def holds(self, profile: Profile, prompt_len: int, new: int, batch_size: int) -> bool:
        """Whether `profile` fits the budget at another workload; what the search streams, as few layers as fit."""
        workload = Workload(prompt_len=prompt_len, max_new_tokens=new, batch_size=batch_size)
        result = estimate(self.label, self.architecture, profile, workload)
        if self._may_stream(profile) and self._on_device(result):
            result = self._resident_first(profile, workload)
        return self.fits(result)

    def longest_prompt(self, profile: Profile, new: int, batch_size: int) -> int:
        """The most prompt tokens that fit before `new` more, 0 where not even one does."""
        longest = self.architecture.max_position_embeddings - new
        return most(longest, lambda length: self.holds(profile, length, new, batch_size))

    def _refusal(self, smallest: Estimate) -> DoesNotFitError:
        """The error for a search that found nothing, with the longest prompt that the smallest profile holds."""
        nearest = self._nearest(smallest.profile)
        needed, room, where = self.needed(smallest), self.budget.vram, "on the GPU, CUDA context included"
        if room is None or needed <= room:  # what is short is the host's
            needed = needed if room is None else smallest.host
            room, where = self.budget.ram, "of host memory"
        work = self.workload
        advice = (
            f"prompt_len={nearest.prompt_len} with max_new_tokens={nearest.max_new_tokens} and "
            f"batch_size={nearest.batch_size} would fit"
            if nearest
            else "not even one token would fit; use a smaller model"
        )
        return DoesNotFitError(
            f"{self.label} with {smallest.profile.weights} weights at {work.prompt_len} + {work.max_new_tokens} "
            f"tokens, batch {work.batch_size}, needs {format_gib(needed)} {where}; "
            f"{format_gib(room)} are allowed; {advice}",
            needed_bytes=needed,
            budget_bytes=room,
            estimate=smallest,
            nearest=nearest,
        )

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
