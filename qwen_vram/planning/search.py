"""The search: candidates from a starting profile, least lossy first, held against a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.estimate import Estimate, estimate
from qwen_vram.arithmetic.machine_file import current
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.split import ONE_DEVICE, split_estimate
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.timing import decode_floor_ms, product_rate
from qwen_vram.arithmetic.weights import streaming_slots
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.planning.budget import Budget
from qwen_vram.planning.fit import fits, needed, on_device
from qwen_vram.planning.loadable import not_loadable
from qwen_vram.planning.moves import Move, change_of, cost_of, search_space
from qwen_vram.planning.reach import nearest
from qwen_vram.planning.refusal import refusal
from qwen_vram.planning.split import balanced
from qwen_vram.planning.tiers import Tiers

Prefer = Literal["quality", "speed", "memory"]

_HOST_CACHE: dict[str, object] = {"kv_cache": "bf16", "kv_device": "host"}
_FROM_DISK = "layers are read from the disk for every token"
_COMPUTED = "layers cross the link, or compute on the CPU, for every token"


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
    """What one step of the search came to, every step up to it, and the profile before it."""

    estimate: Estimate
    steps: tuple[Step, ...]
    before: Profile


class Search:
    """One search over profiles for a model, a workload and a budget; profile and knobs as for `plan`.

    Args:
        split: Layers of each of several GPUs where that is settled; otherwise every profile gets its own.
    """

    def __init__(
        self,
        label: str,
        architecture: Architecture,
        workload: Workload,
        budget: Budget,
        profile: str | Profile,
        knobs: dict[str, object],
        split: Mapping[int, int] | None = None,
    ) -> None:
        self.label = label
        self.architecture = architecture
        self.workload = workload
        self.budget = budget
        self.profile = profile
        self.knobs = knobs
        self.split = split
        self.several = len(budget.devices) > 1
        self.start, moves = search_space(architecture, profile, workload, knobs)
        may_read = profile == "auto" and "disk_layers" not in knobs
        self.may_compute = profile == "auto" and "host_layers" not in knobs
        self.tiers = Tiers(architecture, budget, self.estimate, self.start, may_read=may_read)
        self.moves = tuple(move for move in moves if self._has_room(move))
        self._may_move_head = "lm_head" not in knobs and architecture.stored_format is None
        self._may_move_cache = any(_HOST_CACHE.items() <= move.knobs.items() for move in self.moves)

    def _has_room(self, move: Move) -> bool:
        """Whether a move can be made on these devices: some on one GPU alone, and the table only where the host is."""
        table = self.architecture.vocab_size * self.architecture.hidden_size * self.start.element_bytes
        too_large = self.budget.vram is not None and move.knobs.get("embeddings") == "host" and table > self.budget.ram
        return not too_large and not (self.several and ONE_DEVICE.keys() & move.knobs.keys())

    def candidates(self) -> Iterator[Candidate]:
        """Every profile on the way that loads, and needs less than all before it.

        Raises:
            NotSupportedError: what the caller asked for loads on no machine.
        """
        steps: tuple[Step, ...] = ()
        current, least = self.start, 0
        for move in (None, *self._all_moves()):
            profile = current if move is None else self._after(move, current)
            refused = not_loadable(self.architecture, profile)
            if refused:
                current = profile
                continue
            result = self.estimate(profile, self.workload)
            need = needed(result, self.budget)
            if steps and need >= least:
                continue  # it would cost something and save nothing
            saved = least - need if steps else 0
            turned = move if steps else None
            change, cost = change_of(current, profile, turned), cost_of(profile, turned)
            steps = (*steps, Step(change, need, saved, cost, self._floor(profile)))
            yield Candidate(result, steps, current)
            current, least = profile, need
        if refused and not steps:
            raise refused

    def _all_moves(self) -> Iterator[Move]:
        """The moves; of the last one, where layers stream, other forms.

        A cache that saves nothing on the host while all layers are on the GPU may save much there once they are gone;
        and of what is left then, the buffer that some rows' product with a quantized head takes may be the largest.
        """
        yield from self.moves
        stream = self.moves[-1] if self.moves else None
        if stream is None or "streamed_layers" not in stream.knobs:
            return
        forms: list[dict[str, object]] = [_HOST_CACHE] if self._may_move_cache else []
        if self._may_move_head:
            tied = {"embeddings": self.start.embeddings} if self.architecture.tie_word_embeddings else {}
            forms.append({"lm_head": None, **tied})
        for form in forms:
            yield stream._replace(knobs={**stream.knobs, **form})

    def _after(self, move: Move, current: Profile) -> Profile:
        """`current` with a move made. The last layer stays where streaming it would only make room for a third slot."""
        profile = replace(current.replace(**move.knobs), name=current.name)
        spare = self._may_stream(profile) and streaming_slots(self.architecture, profile) > 2
        return replace(profile, streamed_layers=profile.streamed_layers - 1) if spare else profile

    def run(self, prefer: Prefer) -> Candidate:
        """The candidate that `prefer` asks for.

        Layers are streamed only where nothing else fits, and on one GPU; they stay on the disk only where the host does
        not hold them either.

        Raises:
            DoesNotFitError: none fits.
        """
        fitting: list[Candidate] = []
        seen: list[Candidate] = []
        for candidate in self.candidates():
            streams = self._may_stream(candidate.estimate.profile)
            if streams and fitting:
                break
            seen.append(candidate)
            found = self._fewest_streamed(candidate, prefer) if streams else candidate
            if fits(found.estimate, self.budget):
                fitting.append(found)
                if prefer == "quality":
                    break
        if not fitting:
            least = found if streams else self._from_disk(found)
            others = (self._tiered(candidate, prefer) for candidate in self._from_files(seen))
            fitting = [one for one in (least, *others) if fits(one.estimate, self.budget)][:1]
        if not fitting:
            raise refusal(least.estimate, self.budget, nearest(self))
        if prefer == "memory":
            return fitting[-1]
        return min(fitting, key=lambda found: found.steps[-1].decode_floor_ms)

    def _fewest_streamed(self, everything: Candidate, prefer: Prefer) -> Candidate:
        """A candidate that streams all layers, with as few of them as fit, and of these as few on the disk.

        The cache goes back to where it was at the start, or stays where the moves have brought it: whole rather than
        quantized, then what makes the shorter step. Where nothing fits it is what the host is least short of.
        """
        *before, last = everything.steps
        start, moved = self.start, everything.estimate.profile
        tried = list(self._streamed(moved, self.workload))
        fitting = [result for result in tried if fits(result, self.budget)]
        if not fitting:
            on_the_gpu = [result for result in tried if on_device(result, self.budget)]
            smallest = min(on_the_gpu, key=lambda found: found.host, default=everything.estimate)
            return everything._replace(estimate=smallest)
        best = min(fitting, key=lambda found: (found.profile.kv_cache != start.kv_cache, self._floor(found.profile)))
        if self._should_compute(best.profile, prefer):
            best = self.tiers.quickest(best)
        need, change = needed(best, self.budget), change_of(everything.before, best.profile, _turned(best.profile))
        cost = self._cost_of_tiers(best.profile) or last.cost
        step = Step(change, need, before[-1].needed_bytes - need, cost, self._floor(best.profile))
        return everything._replace(estimate=best, steps=(*before, step))

    def _cost_of_tiers(self, profile: Profile) -> str:
        """What layers cost that are on the disk, or that the CPU computes; empty where there are none."""
        if profile.disk_layers:
            plain = FORMATS[profile.weights].is_dense
            return f"{_FROM_DISK}; of a quantized copy (qwen-vram quantize), fewer bytes" if plain else _FROM_DISK
        return _COMPUTED if profile.host_layers else ""

    def _should_compute(self, profile: Profile, prefer: Prefer) -> bool:
        """Whether layers may compute on the CPU: at a measured rate, and in 4 bits, which it rounds, for speed."""
        rate = product_rate(profile, current())
        return self.may_compute and rate is not None and (prefer == "speed" or FORMATS[profile.weights].is_dense)

    def _streamed(self, moved: Profile, workload: Workload) -> Iterator[Estimate]:
        """With the cache where it was at the start, and where the moves have brought it: as few streamed as fit."""
        start = {"kv_cache": self.start.kv_cache, "kv_device": self.start.kv_device}
        for cache in (start, _HOST_CACHE if self._may_move_cache else start, {}):
            base = replace(moved.replace(**cache), name=moved.name)
            yield self.tiers.fewest_on_disk(self.tiers.resident_first(base, workload))

    def _from_files(self, seen: Sequence[Candidate]) -> list[Candidate]:
        """What the candidates `seen` leave out: layers that stay in the checkpoint's files, because those hold them so.

        What is quantized while it loads has to be in memory; where it does not fit, plain layers may, from the disk.
        """
        plain = [one for one in seen if self.tiers.may_read_layers(one.estimate.profile)]
        if not plain or plain[-1] is seen[-1]:
            return []
        profile, last = plain[-1].estimate.profile, seen[-1]
        if self.budget.vram is not None:
            if not self._may_stream(last.estimate.profile):
                return []
            profile = self._after(self.moves[-1], profile)
        result = self.estimate(profile, self.workload)
        need, before = needed(result, self.budget), last.estimate.profile
        saved, change = last.steps[-1].needed_bytes - need, change_of(before, profile, _turned(profile))
        step = Step(change, need, saved, "layers as the files hold them", self._floor(profile))
        return [Candidate(result, (*last.steps, step), before)]

    def _tiered(self, candidate: Candidate, prefer: Prefer) -> Candidate:
        """A candidate with its layers where they fit."""
        streams = self._may_stream(candidate.estimate.profile)
        return self._fewest_streamed(candidate, prefer) if streams else self._from_disk(candidate)

    def _from_disk(self, last: Candidate) -> Candidate:
        """The last candidate with as few layers on the disk as fit, all where none do; itself where that is no less."""
        result = self.tiers.fewest_on_disk(last.estimate)
        profile, need = result.profile, needed(result, self.budget)
        if (need, result.host) >= (last.steps[-1].needed_bytes, last.estimate.host):
            return last
        change = change_of(last.estimate.profile, profile, _turned(profile))
        cost = self._cost_of_tiers(profile)
        step = Step(change, need, last.steps[-1].needed_bytes - need, cost, self._floor(profile))
        return Candidate(result, (*last.steps, step), last.estimate.profile)

    def _may_stream(self, profile: Profile) -> bool:
        """Whether the search, not the caller, streams layers in `profile`."""
        return profile.streamed_layers > self.start.streamed_layers

    def _floor(self, profile: Profile) -> float:
        return decode_floor_ms(self.architecture, profile, self.workload)

    def estimate(self, profile: Profile, workload: Workload) -> Estimate:
        """What `profile` takes, on one device or split over the budget's several."""
        if self.split:
            return split_estimate(self.label, self.architecture, profile, workload, self.split)
        if self.several:
            return balanced(self.label, self.architecture, profile, workload, self.budget.devices)
        return estimate(self.label, self.architecture, profile, workload)

    def holds(self, profile: Profile, workload: Workload) -> bool:
        """Whether `profile` fits the budget at another workload; what the search streams, as few layers as fit."""
        result = self.estimate(profile, workload)
        if self.budget.vram is not None and self._may_stream(profile) and on_device(result, self.budget):
            return any(fits(found, self.budget) for found in self._streamed(profile, workload))
        return fits(self.tiers.fewest_on_disk(result), self.budget)

    def profiles(self) -> list[Profile]:
        """Every profile that the search may come to: the one that needs the least of the GPU first."""
        found = list(self.candidates())
        from_files = [candidate.estimate.profile for candidate in self._from_files(found)]
        return [candidate.estimate.profile for candidate in found[::-1]] + from_files

    def at(self, workload: Workload) -> Search:
        """The same search for another workload."""
        return Search(self.label, self.architecture, workload, self.budget, self.profile, self.knobs, self.split)


def _turned(profile: Profile) -> Move:
    """Every knob that steps to `profile` may have turned."""
    turned = ("weights", "lm_head", "embeddings", "prefill_chunk_size", "streamed_layers", "host_layers", "disk_layers")
    return Move({knob: getattr(profile, knob) for knob in (*turned, "kv_cache", "kv_device")}, "")
