"""Search of the candidates, least lossy first, for one that fits the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.timing.bytes_moved import product_rate
from qwen_vram.arithmetic.timing.generation import generation_ms
from qwen_vram.planning.capacity.fit import fits, needed, on_device
from qwen_vram.planning.capacity.hardware import is_measured_here
from qwen_vram.planning.capacity.refusal import refusal
from qwen_vram.planning.search.candidates import Candidate, Candidates, Step
from qwen_vram.planning.search.faster import given_back
from qwen_vram.planning.search.largest_workload import nearest
from qwen_vram.planning.search.savers import Saver, change_of
from qwen_vram.planning.support import not_loadable
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import KNOBS, Profile
from qwen_vram.spec.rules.table import for_one_gpu
from qwen_vram.spec.workload import Workload

Prefer = Literal["quality", "speed", "memory"]

_FROM_DISK = "layers are read from the disk for every token"
_COMPUTED = "layers cross the link, or compute on the CPU, for every token"


def _weights_of(profile: Profile) -> tuple[str, str]:
    """The formats of a profile's weights."""
    return profile.weights, profile.head_format


class Search(Candidates):
    """The search of the candidates for one that fits a budget; arguments are as for `Candidates`."""

    def run(self, prefer: Prefer) -> Candidate:
        """Return the candidate that `prefer` asks for.

        Raises:
            DoesNotFitError: no candidate fits.
        """
        found = self.find(prefer)
        if not fits(found[-1].estimate, self.budget):
            raise refusal(found[-1].estimate, self.budget, nearest(self))
        if prefer == "memory":
            return found[-1]
        best = self._fastest(found)
        return best if prefer == "speed" else self._unslowed(best, found[0])

    def _unslowed(self, best: Candidate, found: Candidate) -> Candidate:
        """`best`, or a faster candidate, if a move that makes `found` faster does not fit.

        The other one has the same formats. If no such one has captured steps, it may have keys and values in int8, the
        smallest loss.
        """
        profile = found.estimate.profile
        at_best = self._at_best(profile)
        if self._generation_ms(best.estimate.profile) <= self._generation_ms(at_best):
            return best
        others = [one for one in self._fitting() if _weights_of(one.estimate.profile) == _weights_of(profile)]
        alike = [one for one in others if one.estimate.profile.kv_cache == profile.kv_cache]
        best = self._fastest([best, *alike])
        narrow = [one for one in others if one.estimate.profile.captures and one not in alike]
        if narrow and at_best.captures and not best.estimate.profile.captures:
            best = self._fastest([best, *narrow])
        return best

    def _fitting(self) -> Iterator[Candidate]:
        """Yield the candidates that fit without streamed layers, with keys and values on the GPU."""
        for candidate in self.candidates():
            profile = candidate.estimate.profile
            if self._may_stream(profile) or profile.kv_device != "device":
                return
            if fits(candidate.estimate, self.budget):
                yield candidate

    def _fastest(self, fitting: Sequence[Candidate]) -> Candidate:
        """Return the candidate with the shortest predicted generation, after the moves that make each one faster.

        Of two that take the same time, it is the less lossy one. A candidate is not estimated if it would lose even
        with all moves that make it faster.
        """
        least = [self._generation_ms(self._at_best(one.estimate.profile)) for one in fitting]
        best, quickest = fitting[0], float("inf")
        for bound, candidate in sorted(zip(least, fitting, strict=True), key=lambda pair: pair[0]):
            if bound >= quickest:
                break
            found = self._quickened(candidate)
            took = self._generation_ms(found.estimate.profile)
            if took < quickest:
                best, quickest = found, took
        return best

    def _at_best(self, profile: Profile) -> Profile:
        """`profile` with every move that makes it faster, even if that does not fit."""
        turned: set[str] = set()
        for move in self._given_back(profile):
            quicker = None if turned & move.knobs.keys() else self._quicker(profile, move)
            if quicker:
                turned |= move.knobs.keys()
                profile = quicker
        return profile

    def _given_back(self, profile: Profile) -> Iterator[Saver]:
        """Yield moves that may make a profile faster, on GPUs, if the search chose the profile."""
        if self.profile == "auto" and self.budget.vram is not None:
            for move in given_back(self.start, profile, self.knobs):
                if not (self.several and for_one_gpu(move.knobs)):
                    yield move

    def _quicker(self, before: Profile, move: Saver) -> Profile | None:
        """`before` after a move, if that loads and is predicted to be no slower; otherwise `None`."""
        profile = replace(before.replace(**move.knobs), name=before.name)
        if not_loadable(self.architecture, profile) or self._generation_ms(profile) > self._generation_ms(before):
            return None
        return profile

    def _generation_ms(self, profile: Profile) -> float:
        on_cpu = self.budget.vram is None
        return generation_ms(self.architecture, profile, self.workload, self.machine, on_cpu=on_cpu)

    def _quickened(self, found: Candidate) -> Candidate:
        """`found` after the moves that make it faster and fit."""
        turned: set[str] = set()
        for move in self._given_back(found.estimate.profile):
            before = found.estimate.profile
            profile = None if turned & move.knobs.keys() else self._quicker(before, move)
            if profile is None:
                continue
            result = self.estimate(profile, self.workload)
            if fits(result, self.budget):
                turned |= move.knobs.keys()
                need, steps = needed(result, self.budget), found.steps
                change, saved = change_of(before, profile, move), steps[-1].needed_bytes - need
                step = Step(change, need, saved, move.cost, self._floor(profile))
                found = Candidate(result, (*steps, step), before)
        return found

    def find(self, prefer: Prefer) -> list[Candidate]:
        """Return the candidates that fit, for `"quality"` only the first; if no candidate fits, the last one.

        Layers are streamed only if nothing else fits, and on one GPU. They stay on the disk only if the host does not
        hold them either.
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
            last = found if streams else self._from_disk(found)
            tried = (last, *(self._tiered(candidate, prefer) for candidate in self._from_files(seen)))
            return [next((one for one in tried if fits(one.estimate, self.budget)), last)]
        return fitting

    def _fewest_streamed(self, everything: Candidate, prefer: Prefer) -> Candidate:
        """A candidate that streams all layers, changed to stream the fewest that fit, with the fewest on the disk.

        The cache is that of the start, or that after the moves: first one in the start's format, then the one with the
        shorter decode step. If nothing fits, it is the one for which the host lacks the fewest bytes.
        """
        *before, last = everything.steps
        start, moved = self.start, everything.estimate.profile
        for profile in self._tables(moved):
            tried = list(self._streamed(profile, self.workload))
            fitting = [result for result in tried if fits(result, self.budget)]
            if fitting:
                break
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
        """The cost of layers on the disk, or of layers that the CPU computes; empty without such layers."""
        if profile.disk_layers:
            plain = FORMATS[profile.weights].is_dense
            return f"{_FROM_DISK}; of a quantized copy (qwen-vram quantize), fewer bytes" if plain else _FROM_DISK
        return _COMPUTED if profile.host_layers else ""

    def _should_compute(self, profile: Profile, prefer: Prefer) -> bool:
        """Tell if layers may compute on this CPU: at a measured rate; in 4 bits, which it rounds, for speed only."""
        wanted = self.may_compute and (prefer == "speed" or FORMATS[profile.weights].is_dense)
        measured = wanted and product_rate(profile, self.machine) is not None and is_measured_here(self.machine)
        return measured and self.computes(profile)

    def _tables(self, moved: Profile) -> Iterator[Profile]:
        """Yield `moved`, and `moved` with the embeddings' location of the start, which leaves the host more memory."""
        yield moved
        if moved.embeddings != self.start.embeddings:
            yield replace(moved.replace(embeddings=self.start.embeddings), name=moved.name)

    def _streamed(self, moved: Profile, workload: Workload) -> Iterator[Estimate]:
        """Yield estimates with the fewest layers: the cache as at the start, as in each move, and as it is now."""
        start: dict[str, object] = {"kv_cache": self.start.kv_cache, "kv_device": self.start.kv_device}
        caches: tuple[dict[str, object], ...] = (start, *self.caches, {})
        for base in dict.fromkeys(replace(moved.replace(**cache), name=moved.name) for cache in caches):
            yield self.tiers.fewest_on_disk(self.tiers.resident_first(base, workload))

    def _from_files(self, seen: Sequence[Candidate]) -> list[Candidate]:
        """Candidates that `seen` lacks: layers that stay in the checkpoint's files, in the format of these files.

        Layers that are quantized at load must be in memory. If they do not fit, plain layers may fit, from the disk.
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
        """A candidate with its layers on the tiers that hold them."""
        streams = self._may_stream(candidate.estimate.profile)
        return self._fewest_streamed(candidate, prefer) if streams else self._from_disk(candidate)

    def _from_disk(self, last: Candidate) -> Candidate:
        """The last candidate with the fewest layers on the disk that fit, or all; itself if that saves nothing."""
        result = self.tiers.fewest_on_disk(last.estimate)
        profile, need = result.profile, needed(result, self.budget)
        if (need, result.host) >= (last.steps[-1].needed_bytes, last.estimate.host):
            return last
        change = change_of(last.estimate.profile, profile, _turned(profile))
        cost = self._cost_of_tiers(profile)
        step = Step(change, need, last.steps[-1].needed_bytes - need, cost, self._floor(profile))
        return Candidate(result, (*last.steps, step), last.estimate.profile)

    def holds(self, profile: Profile, workload: Workload) -> bool:
        """Tell if `profile` fits at another workload; if the search streams layers, with the fewest that fit."""
        result = self.estimate(profile, workload)
        if fits(result, self.budget):
            return True
        if self.budget.vram is not None and self._may_stream(profile) and on_device(result, self.budget):
            streamed = (found for table in self._tables(profile) for found in self._streamed(table, workload))
            return any(fits(found, self.budget) for found in streamed)
        return fits(self.tiers.fewest_on_disk(result), self.budget)

    def finds_plan(self, workload: Workload) -> bool:
        """Tell if there is a plan for another workload."""
        return fits(self.at(workload).find("quality")[-1].estimate, self.budget)

    def profiles(self, workload: Workload | None = None) -> list[Profile]:
        """Return every profile that the search may choose; the one that needs the least of the GPU is first."""
        if workload is not None:
            return self.at(workload).profiles()
        found = list(self.candidates())
        from_files = [candidate.estimate.profile for candidate in self._from_files(found)]
        return [candidate.estimate.profile for candidate in found[::-1]] + from_files

    def at(self, workload: Workload) -> Search:
        """The same search for another workload."""
        known = (self.label, self.architecture, workload, self.budget, self.profile, self.knobs, self.split)
        return Search(*known, machine=self.machine, computes=self.computes, session=self.session)


def _turned(profile: Profile) -> Saver:
    """Every knob that the steps to `profile` may have changed, those of the cache last."""
    ordered = sorted(KNOBS, key=("kv_cache", "kv_device").__contains__)
    return Saver({knob: getattr(profile, knob) for knob in ordered}, "")
