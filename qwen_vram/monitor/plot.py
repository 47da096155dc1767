"""A picture of a log: used memory over time, with what plans promised as lines."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from qwen_vram.errors import BackendUnavailableError, WorkloadError
from qwen_vram.monitor.sample import Sample

_INSTALL = 'pip install "qwen-vram[plot]"'
# Okabe and Ito's colors, which color-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GIB = 2**30


def plot_log(samples: Sequence[Sample], out: str | Path) -> None:
    """Draw samples into a file, such as `run.svg` or `run.png`.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        WorkloadError: there are no samples.
    """
    if not samples:
        raise WorkloadError("there is no sample to draw; let the monitor run longer", name="samples", got=0)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            f"a plot needs matplotlib, which is not installed; run: {_INSTALL}", backend="matplotlib", install=_INSTALL
        ) from error
    times = [datetime.fromisoformat(sample.time).timestamp() for sample in samples]
    seconds = [time - times[0] for time in times]
    devices = [gpu.uuid for gpu in samples[0].gpus] or ["host"]
    figure = Figure(figsize=(8, 2.6 * len(devices) + 0.6), layout="constrained")
    for axes, device in zip(figure.subplots(len(devices), squeeze=False)[:, 0], devices, strict=True):
        axes.plot(seconds, [_used(sample, device) / _GIB for sample in samples], color=_COLORS[0], label="used")
        for number, ((pid, model), line) in enumerate(_promises(samples, device).items(), start=1):
            color = _COLORS[number % len(_COLORS)]
            used, promised = zip(*line.values(), strict=True)
            at = [seconds[index] for index in line]
            axes.plot(at, [value / _GIB for value in used], color=color, label=f"{model} ({pid})")
            if promised[0] is not None:
                axes.plot(at, [value / _GIB for value in promised], color=color, linestyle="--", label="its promise")
        axes.set_ylabel("GiB")
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # the legend is above the lines
        axes.set_title(_title(samples[0], device), loc="left", fontsize="medium")
        axes.legend(loc="upper left", fontsize="small", frameon=False, ncols=3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"seconds from {samples[0].time}")
    figure.savefig(Path(out))


def _used(sample: Sample, device: str) -> float:
    if device == "host":
        return sample.host.total - sample.host.available
    return next((gpu.used for gpu in sample.gpus if gpu.uuid == device), float("nan"))


def _title(sample: Sample, device: str) -> str:
    return next((f"{gpu.name}, {gpu.total / _GIB:.1f} GiB" for gpu in sample.gpus if gpu.uuid == device), "host memory")


def _promises(samples: Sequence[Sample], device: str) -> dict[tuple[int, str], dict[int, tuple[float, int | None]]]:
    """By process and model, used and promised bytes by the number of the sample."""
    found: dict[tuple[int, str], dict[int, tuple[float, int | None]]] = {}
    for index, sample in enumerate(samples):
        for plan in sample.plans:
            here = not plan.uuids if device == "host" else device.partition("-")[2] in plan.uuids
            if here:
                used = float("nan") if plan.used is None else plan.used
                found.setdefault((plan.pid, plan.model), {})[index] = (used, plan.total)
    return found
