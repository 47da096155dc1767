"""Candidate profiles from a starting profile, least lossy first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.arithmetic.gpu_split import split_estimate, split_of
from qwen_vram.arithmetic.timing.bytes_moved import decode_floor_ms
from qwen_vram.arithmetic.weights import streaming_slots
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.planning.capacity.fit import needed, needs_less
from qwen_vram.planning.capacity.gpu_split import balanced
from qwen_vram.planning.capacity.hardware import Computes, as_measured, knobs_on
from qwen_vram.planning.search.offload_tiers import Tiers
from qwen_vram.planning.search.savers import Saver, change_of, cost_of, search_space
from qwen_vram.planning.support import not_loadable
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.rules.table import for_one_gpu
from qwen_vram.spec.workload import Workload

_HOST_CACHE: dict[str, object] = {"kv_cache": "bf16", "kv_device": "host"}
# The smallest cache on the device, for a host with little memory.
_SMALL_CACHE: dict[str, object] = {"kv_cache": "int4", "kv_device": "device"}


class Step(NamedTuple):
    """One candidate of the search: the change, the needed bytes, the saved bytes, and the cost.

    `decode_floor_ms` is the least time of its last decode step: bytes over bandwidth. `Plan.times` has predictions.
    """

    change: str
    needed_bytes: int
    saved_bytes: int
    cost: str
    decode_floor_ms: float


class Candidate(NamedTuple):
    """The result of one step of the search, with every step up to it, and the profile before it."""

    estimate: Estimate
    steps: tuple[Step, ...]
    before: Profile


class Candidates:
    """The profiles of one search for a model, a workload and a budget; `profile` and `knobs` are as for `plan`.

    Args:
        machine: The machine whose rates and overheads are counted.
        split: Layers of each of several GPUs, if they are given; otherwise every profile gets its own split.
        computes: Tells if the CPU of this machine can compute streamed layers of a profile.
        session: Also count every smaller workload, in any order, as a plan promises; otherwise this workload alone.
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
        *,
        machine: Machine,
        computes: Computes = as_measured,
        session: bool = True,
    ) -> None:
        self.label = label
        self.architecture = architecture
        self.workload = workload
        self.budget = budget
        self.profile = profile
        self.knobs = knobs_on(budget, knobs) if profile == "auto" else knobs
        self.split = split
        self.machine = machine
        self.computes = computes
        self.session = session
        self.several = len(budget.devices) > 1
        self.start, moves = search_space(architecture, profile, workload, self.knobs)
        may_read = profile == "auto" and "disk_layers" not in knobs and not architecture.adapter_mutates_base
        self.may_compute = profile == "auto" and "host_layers" not in knobs
        self.tiers = Tiers(architecture, budget, self.estimate, self.start, may_read=may_read)
        self.moves = tuple(move for move in moves if self._has_room(move))
        self._may_move_head = "lm_head" not in knobs and architecture.stored_format is None
        forms = {(move.knobs.get("kv_cache"), move.knobs.get("kv_device", "device")) for move in self.moves}
        caches = (_HOST_CACHE, _SMALL_CACHE)
        self.caches = [cache for cache in caches if tuple(cache.values()) in forms]

    def _has_room(self, move: Saver) -> bool:
        """Tell if these devices allow a move: some work on one GPU only, and the embeddings must fit on the host."""
        if self.budget.vram is None and move.knobs.get("captured"):
            return False
        table = self.architecture.vocab_size * self.architecture.hidden_size * self.start.element_bytes
        too_large = self.budget.vram is not None and move.knobs.get("embeddings") == "host" and table > self.budget.ram
        return not too_large and not (self.several and for_one_gpu(move.knobs))

    def candidates(self) -> Iterator[Candidate]:
        """Yield every profile that loads and needs less than all before it.

        Raises:
            NotSupportedError: the requested profile loads on no machine.
        """
        steps: tuple[Step, ...] = ()
        current, least = self.start, 0
        for move in (None, *self._all_moves()):
            profile = current if move is None else self._after(move, current)
            refused = not_loadable(self.architecture, profile)
            if refused:
                continue
            result = self.estimate(profile, self.workload)
            if steps and not needs_less(result, self.budget, least):
                continue  # it has a cost and saves nothing
            need = needed(result, self.budget)
            saved = least - need if steps else 0
            turned = move if steps else None
            change, cost = change_of(current, profile, turned), cost_of(profile, turned)
            steps = (*steps, Step(change, need, saved, cost, self._floor(profile)))
            yield Candidate(result, steps, current)
            current, least = profile, need
        if refused and not steps:
            raise refused

    def _all_moves(self) -> Iterator[Saver]:
        """Yield the moves, then other forms of the last one if it streams layers.

        A host cache may save nothing while all layers are on the GPU, and much after they are streamed. The largest
        part of the rest may then be the buffer for the product of several rows with a quantized head.
        """
        yield from self.moves
        stream = self.moves[-1] if self.moves else None
        if stream is None or "streamed_layers" not in stream.knobs:
            return
        forms = [cache for cache in self.caches if cache is _HOST_CACHE]
        if self._may_move_head:
            tied = {"embeddings": self.start.embeddings} if self.architecture.tie_word_embeddings else {}
            forms.append({"lm_head": None, **tied})
        for form in forms:
            yield stream._replace(knobs={**stream.knobs, **form})

    def _after(self, move: Saver, current: Profile) -> Profile:
        """`current` after a move. The last layer stays if streaming it would only free the bytes of a third slot."""
        profile = replace(current.replace(**move.knobs), name=current.name)
        spare = self._may_stream(profile) and streaming_slots(self.architecture, profile) > 2
        return replace(profile, streamed_layers=profile.streamed_layers - 1) if spare else profile

    def _may_stream(self, profile: Profile) -> bool:
        """Tell if the search, not the caller, streams layers in `profile`."""
        return profile.streamed_layers > self.start.streamed_layers

    def _floor(self, profile: Profile) -> float:
        on_cpu = self.budget.vram is None
        return decode_floor_ms(self.architecture, profile, self.workload, self.machine, on_cpu=on_cpu)

    def estimate(self, profile: Profile, workload: Workload) -> Estimate:
        """Estimate `profile`, on one device or split over the budget's several devices."""
        known, budget = (self.label, self.architecture, profile, workload), self.budget
        split = self.split
        if not split and not self.several:
            return estimate(*known, machine=self.machine, session=self.session, held=budget.held_on_one)
        split = split or split_of(balanced(*known, budget.devices, budget.held, machine=self.machine))
        return split_estimate(*known, split, machine=self.machine, session=self.session, held=budget.held)
