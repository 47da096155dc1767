"""The estimate: predicted peak memory of a model, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_vram.arithmetic.process import (
    SEARCHED_TO,
    Replayed,
    least_reserved,
    least_reserved_is_at_most,
    load_reserved_bytes,
    process_bytes,
    replay,
)
from qwen_vram.arithmetic.replay.live_bytes import Moment
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qwen_vram.arithmetic.render import Shown


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predicted peak device memory by part, in bytes. It contains no budget.

    The parts of `shares()` sum to `peak_allocated`. Weights are exact. `kv_cache` is the full cache at the end of the
    workload, and `activations` are the other bytes of the peak. With a growing cache the peak may be in the prefill;
    some bytes of the full cache are then still free for activations. `moments` has the live bytes of every moment, by
    part. `activations`, and all sizes that depend on it, replay torch's allocator on first use, in about 20 ms.

    Attributes:
        model: The name of the model.
        architecture: Its shape; `None` for a bare number of parameters.
        profile: The knobs of the estimate.
        workload: The lengths of the estimate.
        weights: Weights on the device, with quantization state.
        kv_cache: Keys and values on the device when the context is full.
        tensors: The other tensors of the peak moment, without the allocator's rounding.
        workspace: cuBLAS's workspace, rotary buffers, and bytes that torch's allocator adds to the weights.
        load_peak: The most allocated bytes while the model loads.
        host: Host memory for streamed layers, host embeddings and a host cache.
        disk: Bytes that are read of layers in the checkpoint's files. The page cache may keep them in free memory: they
            are not part of `host`.
        moments: Cache and activations at each moment of the steps that can have the peak.
        machine: The machine whose CUDA context and kernels are counted: measured by `qwen-vram calibrate`, or the
            default.
        devices: If a model is split over several GPUs, the estimate of each part by the GPU's number; every size here
            is then their sum.
        held: Bytes that the process takes of the device beside torch's memory before it loads this model.
        covered: For a plan: estimates of smaller workloads, which a session runs before or after this one and which can
            need more. `needed_bytes` and `process_total` are then those of the whole session.
    """

    model: str
    architecture: Architecture | None
    profile: Profile
    workload: Workload
    weights: int
    kv_cache: int
    tensors: int
    workspace: int
    load_peak: int
    host: int
    disk: int
    moments: tuple[Moment, ...]
    machine: Machine
    devices: Mapping[int, Estimate] = field(default_factory=dict, hash=False)
    held: int = 0
    covered: tuple[Estimate, ...] = ()

    @cached_property
    def _replayed(self) -> Replayed:
        assert self.architecture is not None
        return replay(self.architecture, self.profile, self.workload)

    @property
    def activations(self) -> int:
        """The other bytes of the peak moment, with the rests of blocks that the allocator cannot split."""
        if self.architecture is None:
            return self.tensors
        if self.devices:
            return self.sum("activations")
        return max(self.tensors, self._replayed.peak - self.weights - self.kv_cache - self.workspace)

    @property
    def peak_allocated(self) -> int:
        """The most bytes that torch has allocated at once (`torch.cuda.max_memory_allocated`)."""
        return self.weights + self.kv_cache + self.activations + self.workspace

    @property
    def peak_reserved(self) -> int:
        """The bytes that torch reserves, with fragments."""
        if self.devices:
            return self.sum("peak_reserved")
        return self.peak_allocated if self.architecture is None else max(self.peak_allocated, self._replayed.reserved)

    @property
    def process_total(self) -> int:
        """The most bytes that nvidia-smi shows for the process, with CUDA context and loaded kernels."""
        if self.devices:
            return self.sum("process_total")
        if self.architecture is None:
            return self.peak_allocated
        if not self.covered:
            return self._process(self.peak_reserved)
        from qwen_vram.arithmetic.session import smaller_step_bytes  # for plans only

        beside = smaller_step_bytes(self.architecture, self.profile, self.workload)
        most = beside + max(one.peak_reserved for one in (self, *self.covered))
        return self._process(max(most, self._session_least))

    @property
    def beside_torch(self) -> int:
        """The bytes that nvidia-smi shows for the process beside torch's reserved memory."""
        return self.sum("beside_torch") if self.devices else self._process(0)

    def _process(self, reserved: int) -> int:
        """Return the bytes that nvidia-smi shows for the process if torch has reserved `reserved` bytes."""
        return process_bytes(reserved, self.profile, self.machine, self.held)

    @property
    def peak_moment(self) -> Moment | None:
        """The moment of the peak; `None` for a bare number of parameters, and for several devices."""
        return max(self.moments, key=lambda moment: moment.total, default=None)

    def parts(self) -> dict[str, int]:
        """The four parts of `peak_allocated`, in bytes by name."""
        return {name: getattr(self, name) for name in ("weights", "kv_cache", "activations", "workspace")}

    def shares(self) -> dict[str, float]:
        """Each part's share of `peak_allocated`; they sum to 1."""
        return {name: size / self.peak_allocated for name, size in self.parts().items()}

    def fits(self, budget: str | int) -> bool:
        """Tell if the whole process, also while it loads, fits in `budget` (`"8GiB"`, or an `int` of bytes).

        Raises:
            UnitError: `budget` has no unit.
        """
        from qwen_vram.units import parse_bytes

        return self.needed_bytes <= parse_bytes(budget, name="budget")

    @cached_property
    def needed_bytes(self) -> int:
        """The smallest budget that the process fits, while it runs and while it loads.

        It is less than `process_total` if much of that is fragments, because torch returns unused segments before it is
        out of memory. Replays under a limit find it, to 16 MiB, with 1 % added for the error of a replay.
        """
        if self.architecture is None:
            return self.peak_allocated
        if self.devices:
            return self.sum("needed_bytes")
        least = self._session_least if self.covered else self._least
        return self._process(least)

    @cached_property
    def _least(self) -> int:
        """The least bytes that torch must be able to reserve for this workload alone, and for loading."""
        assert self.architecture is not None
        return least_reserved(self.architecture, self.profile, self.workload, self._unlimited)

    @property
    def _unlimited(self) -> int:
        """The bytes that torch reserves without a limit, while it loads or while it runs."""
        assert self.architecture is not None
        return max(self.peak_reserved, load_reserved_bytes(self.architecture, self.profile))

    @cached_property
    def _session_least(self) -> int:
        """The least bytes that torch must be able to reserve for a session of workloads up to this one."""
        assert self.architecture is not None
        from qwen_vram.arithmetic.session import Run, session_least

        runs = [Run(one._replayed.peak, one._unlimited, one._least) for one in (self, *self.covered)]
        return session_least(self.architecture, self.profile, self.workload, runs)

    def needs_at_most(self, limit: int) -> bool:
        """Tell if `needed_bytes` is at most `limit`. For one device it is faster than the comparison."""
        if self.architecture is None or self.devices or "needed_bytes" in vars(self):
            return self.needed_bytes <= limit
        left = limit - self._process(0)
        if not self.covered:
            return self._least_is_at_most(left)
        from qwen_vram.arithmetic.session import margin_bytes, with_miss

        runs = (self, *self.covered)
        peak = max(one._replayed.peak for one in runs)
        left -= margin_bytes(self.architecture, self.profile, self.workload, peak)
        return with_miss(peak) <= left and all(one._runs_in_session(left) for one in runs)

    def _least_is_at_most(self, limit: int) -> bool:
        """Tell if `_least` is at most `limit`, by the same search, which ends when that is known."""
        assert self.architecture is not None
        return least_reserved_is_at_most(self.architecture, self.profile, self.workload, self._unlimited, limit)

    def _runs_in_session(self, limit: int) -> bool:
        """Tell if the bytes that a session counts for this workload (`Run.counted`) are at most `limit`."""
        unlimited = self._unlimited
        return self._least_is_at_most(limit - SEARCHED_TO) or (unlimited <= limit and self._least == unlimited)

    @property
    def is_of_session(self) -> bool:
        """Tell if `needed_bytes` and `process_total` also hold for every smaller workload, one after the other."""
        return bool(self.covered) or any(part.covered for part in self.devices.values())

    def sum(self, part: str) -> int:
        """The sum of a part's bytes over all devices."""
        return sum(getattr(one, part) for one in self.devices.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`; sizes in bytes."""
        several = {"devices": {device: _of_device(one) for device, one in self.devices.items()}} if self.devices else {}
        return {
            "model": self.model,
            "num_parameters": self.architecture.num_parameters if self.architecture else None,
            "profile": asdict(self.profile),
            "workload": asdict(self.workload),
            **self.parts(),
            "peak_allocated": self.peak_allocated,
            "peak_reserved": self.peak_reserved,
            "process_total": self.process_total,
            "needed_bytes": self.needed_bytes,
            "session": self.is_of_session,
            "load_peak": self.load_peak,
            "host": self.host,
            "disk": self.disk,
            "shares": self.shares(),
            "moments": [moment._asdict() for moment in self.moments],
            "machine": self.machine._asdict(),
            **several,
        }

    def shown(self) -> Shown:
        """Return its texts and figures for display: as text, in a notebook and as a picture."""
        from qwen_vram.arithmetic.render import Shown  # an estimate that is not shown starts sooner

        parts = [(device, part, part.architecture) for device, part in self.devices.items()]
        devices = tuple((device, _span(shape), part._sizes()) for device, part, shape in parts if shape)
        return Shown(self._subject, self._headline, self._sizes(), self.shares(), devices)

    def _sizes(self) -> dict[str, int]:
        from qwen_vram.arithmetic.render import SHOWN

        return {name: getattr(self, name) for name in SHOWN}

    @property
    def _headline(self) -> str:
        if self.architecture is None or not self.machine.is_measured("cuda_context"):
            return self._subject
        return f"{self._subject} | CUDA context measured on {self.machine.device}, {self.machine.date}"

    @property
    def _subject(self) -> str:
        profile, workload = self.profile, self.workload
        compiled = ", compiled" if profile.compiled else ", captured" if profile.captured else ""
        return (
            f"{self.model} | {profile.name}: {profile.weights} weights, {profile.attention} attention, "
            f"{profile.cache} cache{compiled} | {workload.prompt_len:,} + {workload.max_new_tokens:,} tokens, "
            f"batch {workload.batch_size}{', padded' if workload.padded else ''}"
        )

    def __str__(self) -> str:
        """A table of the parts."""
        from qwen_vram.arithmetic.render import text

        return text(self.shown())

    def _repr_html_(self) -> str:
        from qwen_vram.arithmetic.render import html

        return html(self.shown())

    def plot(self) -> Axes:
        """One bar of the four parts, as a matplotlib `Axes`.

        Raises:
            BackendUnavailableError: matplotlib is not installed.
        """
        from qwen_vram.arithmetic.render import plot

        return plot(self.shown())


def _span(part: Architecture) -> str:
    """Return the first and the last of a part's layers, such as `0-13`."""
    return f"{part.first_layer}-{part.first_layer + part.num_hidden_layers - 1}"


def _of_device(part: Estimate) -> dict[str, Any]:
    """One of several devices' parts as plain data."""
    assert part.architecture is not None
    totals = ("peak_allocated", "peak_reserved", "process_total", "needed_bytes", "load_peak", "host")
    return {
        "first_layer": part.architecture.first_layer,
        "layers": part.architecture.num_hidden_layers,
        **part.parts(),
        **{name: getattr(part, name) for name in totals},
        "moments": [moment._asdict() for moment in part.moments],
    }
