"""Samples as rows of CSV, and as tables for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qwen_vram.monitor.sample import GpuUse, PlanUse, Sample
from qwen_vram.units import format_bytes

COLUMNS = (
    "time",
    "device",
    "name",
    "total",
    "used",
    "free",
    "utilization",
    "power",
    "temperature",
    "pid",
    "process",
    "process_used",
    "model",
    "promised",
    "measured_peak",
)


def csv_rows(sample: Sample, *, header: bool) -> str:
    """Return lines of CSV: one for each process of each GPU, or for the GPU or the host without one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    for row in _rows(sample):
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()


def _rows(sample: Sample) -> Iterator[dict[str, object]]:
    for gpu in sample.gpus:
        facts: dict[str, object] = {
            "time": sample.time,
            "device": gpu.uuid,
            **{name: getattr(gpu, name) for name in ("name", "total", "used", "free")},
            **{name: getattr(gpu, name) for name in ("utilization", "power", "temperature")},
        }
        for process in gpu.processes:
            own = {"pid": process.pid, "process": process.name, "process_used": process.used}
            yield {**facts, **own, **_of_plan(_plan_of(sample, gpu, process.pid))}
        if not gpu.processes:
            yield facts
    host = sample.host
    facts = {"time": sample.time, "device": "host", "total": host.total, "free": host.available}
    facts["used"] = host.total - host.available
    on_host = [plan for plan in sample.plans if not plan.uuids]
    for plan in on_host:
        yield {**facts, "pid": plan.pid, "process_used": plan.used, **_of_plan(plan)}
    if not on_host:
        yield facts


def _plan_of(sample: Sample, gpu: GpuUse, pid: int) -> PlanUse | None:
    return next((plan for plan in sample.plans if plan.pid == pid and gpu.uuid.partition("-")[2] in plan.uuids), None)


def _of_plan(plan: PlanUse | None) -> dict[str, object]:
    if plan is None:
        return {}
    peak = plan.measured.get("process_total")
    return {"model": plan.model, "promised": plan.total, "measured_peak": peak}


def tables(sample: Sample, peak: Mapping[str, int]) -> RenderableType:
    """Return a sample for the terminal, with the peak of each device so far."""
    parts: list[RenderableType] = []
    for number, gpu in enumerate(sample.gpus):
        facts = [
            None if gpu.utilization is None else f"{gpu.utilization} %",
            None if gpu.power is None else f"{gpu.power:.0f} W",
            None if gpu.temperature is None else f"{gpu.temperature} C",
        ]
        parts.append(_bar(f"GPU {number}, {gpu.name}", gpu.used, gpu.total, peak.get(gpu.uuid, gpu.used), facts))
        if gpu.processes:
            parts.append(_processes(sample, gpu))
    used = sample.host.total - sample.host.available
    parts.append(_bar("host", used, sample.host.total, peak.get("host", used), []))
    if not sample.gpus:
        why = "no NVIDIA GPU is visible" if sample.driver else "there is no NVIDIA driver"
        parts.append(Text(f"{why}: this is the host's memory alone"))
    parts += [_plan(plan) for plan in sample.plans]
    return Group(*parts)


def _bar(name: str, used: int, total: int, peak: int, facts: list[str | None]) -> Table:
    line = Table.grid(padding=(0, 1))
    line.add_column(min_width=12)
    figures = f"{format_bytes(used)} of {format_bytes(total)}, peak {format_bytes(peak)}"
    told = [fact for fact in facts if fact]
    line.add_row(Text(name), ProgressBar(total=total, completed=used, width=16), Text(", ".join([figures, *told])))
    return line


def _processes(sample: Sample, gpu: GpuUse) -> Table:
    table = Table("process", "program", "used", "promised", "share", box=None, padding=(0, 2))
    for process in gpu.processes:
        plan = _plan_of(sample, gpu, process.pid)
        promised = plan.total if plan else None
        share = f"{process.used / promised:.0%}" if promised and process.used is not None else ""
        used = "unknown" if process.used is None else format_bytes(process.used)
        table.add_row(str(process.pid), process.name, used, format_bytes(promised) if promised else "", share)
    return table


def _plan(plan: PlanUse) -> Table:
    title = f"{plan.model} in process {plan.pid}, {plan.generations:,} generations"
    table = Table("part", "promised", "measured", title=Text(title), title_justify="left", box=None, padding=(0, 2))
    for part, promised in plan.promised.items():
        measured = plan.measured.get(part)
        table.add_row(part, format_bytes(promised), "" if measured is None else format_bytes(measured))
    return table
