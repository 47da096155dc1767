"""The planner: the first profile, least lossy first, that fits a budget; and `Plan`, which the loader obeys."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.estimate import Estimate, estimate
from qwen_vram.arithmetic.model import ModelLike, resolve_model, stored_knobs
from qwen_vram.arithmetic.profile import Profile, resolve_profile
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.timing import decode_floor_ms
from qwen_vram.arithmetic.workload import Workload
from qwen_vram.errors import DoesNotFitError, UnknownNameError
from qwen_vram.planning.budget import Budget, VramLike
from qwen_vram.planning.placement import Placement, Where, place
from qwen_vram.units import format_bytes, format_gib

Prefer = Literal["quality", "speed", "memory"]

# Where the search begins: nothing lost, nothing expanded, nothing that grows.
_LOSSLESS = Profile(name="auto", attention="fused", cache="preallocated")


class Move(NamedTuple):
    """One step of the search: the knobs it turns, and what that costs."""

    knobs: dict[str, object]
    cost: str


# Least lossy first: what costs nothing, then precision. Each move builds on those before it.
_MOVES = (
    Move({"prefill_chunk_size": 4096}, "nothing lost: the same tokens, fed in chunks"),
    Move({"prefill_chunk_size": 2048}, "nothing lost: the same tokens, fed in chunks"),
    Move({"prefill_chunk_size": 1024}, "nothing lost: the same tokens, slightly slower prefill"),
    Move({"embeddings": "host"}, "nothing lost: rows are gathered on the host"),
    Move({"prefill_chunk_size": 512}, "nothing lost: the same tokens, slower prefill"),
    Move({"weights": "int8"}, "8-bit weights: close to lossless, slow"),
    Move({"weights": "nf4"}, "4-bit weights"),
    Move({"lm_head": "nf4"}, "4-bit head"),
)


class Step(NamedTuple):
    """One candidate of the search: what was changed, what it needs, what it saved, and what it costs."""

    change: str
    needed_bytes: int
    saved_bytes: int
    cost: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be loaded and how, and what it will take. `load()` obeys it, `LoadedModel.report()` checks it.

    Attributes:
        estimate: The prediction; model, profile and workload are in it.
        budget: What it was made for.
        placement: Where each module goes.
        steps: Every candidate on the way, in order.
    """

    estimate: Estimate
    budget: Budget
    placement: Placement
    steps: tuple[Step, ...]

    @property
    def profile(self) -> Profile:
        """The knobs chosen."""
        return self.estimate.profile

    @property
    def workload(self) -> Workload:
        """The tokens planned for."""
        return self.estimate.workload

    @property
    def device_map(self) -> dict[str, Where]:
        """Where each module goes, as `transformers` takes it."""
        return self.placement.device_map

    @property
    def on_cpu(self) -> bool:
        """Whether everything runs on the host, because there is no GPU or the caller chose so."""
        return self.placement.rest == "cpu"

    @property
    def room(self) -> str:
        """The budget in words, such as `8.00 GiB of the GPU`."""
        if self.budget.vram is None or self.on_cpu:
            return f"{format_gib(self.budget.ram)} of the host"
        return f"{format_gib(self.budget.vram)} of the GPU"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that `json.dumps` takes; sizes in bytes."""
        return {
            "model": self.estimate.model,
            "profile": asdict(self.profile),
            "estimate": self.estimate.to_dict(),
            "budget": asdict(self.budget),
            "device_map": self.device_map,
            "steps": [step._asdict() for step in self.steps],
        }

    def __str__(self) -> str:
        """The steps of the search and the table of the estimate."""
        lines = [f"plan for {self.estimate.model}"]
        for step in self.steps:
            saved = f", saves {format_bytes(step.saved_bytes)}" if step.saved_bytes > 0 else ""
            lines.append(f"  {step.change}: needs {format_gib(step.needed_bytes)}{saved} ({step.cost})")
        lines.append(f"  fits in {self.room}")
        return "\n".join([*lines, str(self.estimate)])


def plan(
    model: ModelLike,
    *,
    profile: str | Profile = "auto",
    vram: VramLike = None,
    ram: str | int | None = None,
    prefer: Prefer = "quality",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    adapter: str | Path | None = None,
    **knobs: object,
) -> Plan:
    """The least lossy way to run `model` at a workload within a budget, found by arithmetic alone.

    With `profile="auto"` the knobs named in `knobs` stay as the caller set them and the others are searched: what
    costs nothing first (chunks, host embeddings), then precision. Context and batch are never shortened. With any
    other profile nothing is searched, and the plan is that profile if it fits.

    Args:
        model: As for `estimate_vram`.
        profile: `"auto"`, a name from `PROFILES`, or a `Profile`.
        vram: The most that nvidia-smi may show for the process: `"8GiB"`, an `int` of bytes, `{0: "8GiB"}`, or `None`
            for what is free now; without a GPU the plan is for the host.
        ram: Likewise for the host.
        prefer: `"quality"` takes the first profile that fits, `"memory"` the smallest one, `"speed"` the one that
            moves the fewest bytes for a token among those that fit.
        adapter: Folder or hub id of a LoRA adapter that runs beside the base.

    Raises:
        DoesNotFitError: nothing fits; the exception carries the bytes, the estimate and the nearest workload.
        UnknownNameError, WorkloadError, ConfigError, UnitError, HubError: as for `estimate_vram`.
    """
    label, architecture = resolve_model(model, adapter)
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if prefer not in ("quality", "speed", "memory"):
        raise UnknownNameError("prefer", prefer, ("quality", "speed", "memory"))
    start, moves = _search_space(profile, workload, stored_knobs(architecture, knobs))
    workload.check(architecture)
    budget = Budget.of(vram, ram)
    return Search(label, architecture, workload, budget).run(start, moves, prefer)


def _search_space(
    profile: str | Profile, workload: Workload, knobs: dict[str, object]
) -> tuple[Profile, tuple[Move, ...]]:
    """The profile to start from, and the moves that touch only what the caller left open."""
    if profile != "auto":
        return resolve_profile(profile, **knobs), ()
    start = replace(_LOSSLESS.replace(**knobs), name="auto")
    return start, tuple(move for move in _MOVES if _is_open(move, workload, knobs))


def _is_open(move: Move, workload: Workload, knobs: dict[str, object]) -> bool:
    """Whether the caller left the move's knobs open; a chunk that the prompt does not fill saves nothing."""
    if move.knobs.keys() & knobs.keys():
        return False
    chunk = move.knobs.get("prefill_chunk_size")
    return not isinstance(chunk, int) or chunk < workload.prompt_len


def _change(candidate: Profile, move: Move | None) -> str:
    if move is None:
        return f"{candidate.weights} weights, {candidate.attention} attention, {candidate.cache} cache"
    return ", ".join(f"{knob}={value!r}" for knob, value in move.knobs.items())


def _cost(candidate: Profile, move: Move | None) -> str:
    if move is None:
        return "nothing lost" if FORMATS[candidate.weights].is_dense else f"{candidate.weights} weights"
    return move.cost


class Search:
    """One search over profiles for a model, a workload and a budget."""

    def __init__(self, label: str, architecture: Architecture, workload: Workload, budget: Budget) -> None:
        self.label = label
        self.architecture = architecture
        self.workload = workload
        self.budget = budget

    def run(self, start: Profile, moves: tuple[Move, ...], prefer: Prefer) -> Plan:
        """The plan that `prefer` asks for.

        Raises:
            DoesNotFitError: no candidate fits.
        """
        steps: list[Step] = []
        fitting: list[tuple[Estimate, tuple[Step, ...]]] = []
        best: Estimate | None = None
        current = start
        for move in (None, *moves):
            candidate = current if move is None else replace(current.replace(**move.knobs), name=start.name)
            result = estimate(self.label, self.architecture, candidate, self.workload)
            if best is not None and self.needed(result) >= self.needed(best):
                continue  # it would cost something and save nothing
            saved = self.needed(best) - self.needed(result) if best is not None else 0
            steps.append(Step(_change(candidate, move), self.needed(result), saved, _cost(candidate, move)))
            best, current = result, candidate
            if self.fits(result):
                fitting.append((result, tuple(steps)))
                if prefer == "quality":
                    break
        assert best is not None
        if not fitting:
            raise self._refusal(best)
        chosen, way = fitting[0]
        if prefer == "memory":
            chosen, way = min(fitting, key=lambda pair: self.needed(pair[0]))
        elif prefer == "speed":
            chosen, way = min(fitting, key=lambda pair: self._floor_ms(pair[0]))
        device: Where = "cpu" if self.budget.vram is None else 0
        placement = place(self.architecture, chosen.profile, device=device)
        return Plan(estimate=chosen, budget=self.budget, placement=placement, steps=way)

    def needed(self, result: Estimate) -> int:
        """Bytes needed on what the plan runs on: the whole process on a GPU, weights and live tensors on the host."""
        if self.budget.vram is None:
            return result.weights + result.kv_cache + result.activations + result.host
        return result.needed_bytes

    def fits(self, result: Estimate) -> bool:
        """Whether both the device and the host hold it."""
        if self.budget.vram is None:
            return self.needed(result) <= self.budget.ram
        return result.needed_bytes <= self.budget.vram and result.host <= self.budget.ram

    def _floor_ms(self, result: Estimate) -> float:
        return decode_floor_ms(self.architecture, result.profile, self.workload)

    def _refusal(self, smallest: Estimate) -> DoesNotFitError:
        """The error for a search that found nothing, with the longest prompt that the smallest profile holds."""
        nearest = self._nearest(smallest.profile)
        room = self.budget.ram if self.budget.vram is None else self.budget.vram
        where = "of host memory" if self.budget.vram is None else "on the GPU, CUDA context included"
        work = self.workload
        advice = (
            f"prompt_len={nearest.prompt_len} with max_new_tokens={nearest.max_new_tokens} and "
            f"batch_size={nearest.batch_size} would fit"
            if nearest
            else "not even one token would fit; use a smaller model"
        )
        return DoesNotFitError(
            f"{self.label} with {smallest.profile.weights} weights at {work.prompt_len} + {work.max_new_tokens} "
            f"tokens, batch {work.batch_size}, needs {format_gib(self.needed(smallest))} {where}; "
            f"{format_gib(room)} are allowed; {advice}",
            needed_bytes=self.needed(smallest),
            budget_bytes=room,
            estimate=smallest,
            nearest=nearest,
        )

    def _nearest(self, profile: Profile) -> Workload | None:
        """The longest prompt that fits, with this workload's batch and new tokens, then with a batch of one."""
        for batch_size, new in ((self.workload.batch_size, self.workload.max_new_tokens), (1, 1)):
            longest = self.architecture.max_position_embeddings - new
            shortest_fails = longest < 1 or not self._holds(profile, 1, new, batch_size)
            if shortest_fails:
                continue
            low, high = 1, longest
            while low < high:
                middle = (low + high + 1) // 2
                if self._holds(profile, middle, new, batch_size):
                    low = middle
                else:
                    high = middle - 1
            return Workload(prompt_len=low, max_new_tokens=new, batch_size=batch_size)
        return None

    def _holds(self, profile: Profile, prompt_len: int, new: int, batch_size: int) -> bool:
        workload = Workload(prompt_len=prompt_len, max_new_tokens=new, batch_size=batch_size)
        return self.fits(estimate(self.label, self.architecture, profile, workload))
