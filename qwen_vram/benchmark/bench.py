"""`bench()`: configurations of a model in fresh processes, predicted beside measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from qwen_vram.benchmark.configurations import Configuration, chosen, configurations
from qwen_vram.benchmark.process import run_case
from qwen_vram.benchmark.results import newest, read_benchmark
from qwen_vram.benchmark.row import BenchmarkRow
from qwen_vram.checkpoints.cpu_info import cpu_name
from qwen_vram.checkpoints.files.place import place_of
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.errors import BackendUnavailableError, UnitError, UnknownNameError, WorkloadError
from qwen_vram.monitor.log import Log
from qwen_vram.planning.capacity.nvml import driver, text_of, told, visible_handles
from qwen_vram.spec.workload import Workload

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate")

OneOrMore = int | Sequence[int]


@dataclass(frozen=True)
class Benchmark:
    """The rows of a benchmark, in the order in which they were asked for."""

    rows: tuple[BenchmarkRow, ...]

    @property
    def failed(self) -> tuple[BenchmarkRow, ...]:
        """The rows that did not run; each has its reason as `error`."""
        return tuple(row for row in self.rows if row.error is not None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for `json.dumps`."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def markdown(self) -> str:
        """Return tables in Markdown, with the article's own figures if its workload was run."""
        from qwen_vram.benchmark.table import markdown

        return markdown(self.rows)

    def plot(self, out: str | Path) -> None:
        """Draw memory and times of each row into a file, such as `bench.svg` or `bench.png`.

        Raises:
            BackendUnavailableError: matplotlib is not installed.
            WorkloadError: no row ran.
        """
        from qwen_vram.benchmark.plot import plot_rows

        plot_rows(self.rows, out)

    def __str__(self) -> str:
        return self.markdown()


def bench(
    model: str | Path,
    *,
    rows: Sequence[str] | None = None,
    prompt_len: OneOrMore = 512,
    max_new_tokens: OneOrMore = 512,
    batch_size: OneOrMore = 1,
    vram: str | int | Sequence[str | int] | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    timeout: float = 600.0,
    on_row: Callable[[BenchmarkRow, int, int], object] | None = None,
) -> Benchmark:
    """Measure configurations of a model: memory, times and energy, beside their predictions.

    Each row runs in a fresh process, one after the other, so that the GPU should have no other work. A row that fails
    has its reason as `error`, and the others are measured.

    Args:
        model: A checkpoint folder, a catalog name, or a hub id.
        rows: Names of configurations, which docs/benchmark.md lists. `None` is all that the device can run.
        prompt_len, max_new_tokens, batch_size: A number, or several; every combination is measured.
        vram: Budgets of plans, such as `"8GiB"`, beside the plan for the free memory.
        device: `"cuda"` or `"cpu"`; `None` uses the GPU if there is one.
        out: A file of results. Rows in it that ran with the same versions on the same device are not run again.
        timeout: The most seconds of a row.
        on_row: Called with each row, its number from 1 on, and the number of all rows.

    Raises:
        UnknownNameError, WorkloadError, UnitError: a row, a length or a size that cannot be measured.
        ConfigError, CheckpointError, HubError: the model cannot be used.
        BackendUnavailableError: there is no GPU, and one is needed.
        LogError: `out` cannot be read or written.
    """
    label = str(model)
    folder = place_of(model).folder
    source = label if folder is None else str(folder.resolve())
    _, architecture = resolve_model(source)
    on_cpu = _is_on_cpu(device)
    budgets = [] if vram is None else [vram] if isinstance(vram, (str, int)) else list(vram)
    if budgets and on_cpu:
        raise BackendUnavailableError(
            f"vram={vram!r} is a budget of a GPU, and the benchmark runs on the CPU; leave vram out", backend="cuda"
        )
    asked = chosen(configurations(architecture, budgets), rows, on_cpu=on_cpu)
    lengths = [
        _each("prompt_len", prompt_len),
        _each("max_new_tokens", max_new_tokens),
        _each("batch_size", batch_size),
    ]
    workloads = [
        Workload(prompt_len=prompt, max_new_tokens=new, batch_size=batch) for prompt, new, batch in product(*lengths)
    ]
    for workload in workloads:
        workload.check(architecture)
    if isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise UnitError(f"timeout must be a positive number of seconds, got {timeout!r}", got=timeout)
    known = read_benchmark(out) if out is not None and Path(out).exists() else []
    done = {row.key: row for row in known if row.error is None}
    facts = {"model": label, "device": _device_name(on_cpu), "on_cpu": on_cpu, "versions": _versions()}
    made: list[BenchmarkRow] = []
    with ExitStack() as stack:
        log = None if out is None else stack.enter_context(Log(out))
        for number, empty in enumerate(_rows(asked, workloads, facts), start=1):
            row = done.get(empty.key)
            if row is None:
                row = _measured(empty, source, asked, timeout)
                if log is not None:
                    log.write(row)
            made.append(row)
            if on_row is not None:
                on_row(row, number, len(asked) * len(workloads))
    return Benchmark(tuple(newest(made)))


def _rows(
    asked: Sequence[Configuration], workloads: Sequence[Workload], facts: dict[str, Any]
) -> Iterator[BenchmarkRow]:
    """Yield the rows to measure, without figures."""
    for workload in workloads:
        for one in asked:
            yield BenchmarkRow(
                **facts,
                configuration=one.name,
                about=one.about,
                by=one.by,
                prompt_len=workload.prompt_len,
                max_new_tokens=workload.max_new_tokens,
                batch_size=workload.batch_size,
                date=date.today().isoformat(),
            )


def _measured(empty: BenchmarkRow, source: str, asked: Sequence[Configuration], timeout: float) -> BenchmarkRow:
    from dataclasses import replace

    (arguments,) = [one.arguments for one in asked if one.name == empty.configuration]
    case = {
        "model": source,
        "by": empty.by,
        "arguments": arguments,
        "prompt_len": empty.prompt_len,
        "max_new_tokens": empty.max_new_tokens,
        "batch_size": empty.batch_size,
        "device": "cpu" if empty.on_cpu else "cuda",
    }
    return replace(empty, **run_case(case, timeout))


def _each(name: str, value: OneOrMore) -> list[int]:
    several = [value] if isinstance(value, int) else list(value)
    if not several:
        raise WorkloadError(f"{name} must be a number or several, got none", name=name, got=value)
    return list(dict.fromkeys(several))


def _is_on_cpu(device: str | None) -> bool:
    if device not in (None, "cuda", "cpu"):
        raise UnknownNameError("device", device, ("cuda", "cpu"))
    if device == "cpu":
        return True
    import torch

    if torch.cuda.is_available():
        return False
    if device == "cuda":
        raise BackendUnavailableError("torch sees no GPU here; use device='cpu'", backend="cuda")
    return True


def _device_name(on_cpu: bool) -> str:
    """The device, without a CUDA context in this process."""
    if on_cpu:
        import torch

        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    with driver() as pynvml:
        handles = visible_handles(pynvml) if pynvml else []
        return text_of(told(pynvml, "nvmlDeviceGetName", handles[0])) if handles else "NVIDIA GPU"


def _versions() -> dict[str, str]:
    own = import_module("qwen_vram").__version__  # an import statement would be a circle
    return {"qwen_vram": own, **{name: version(name) for name in _LIBRARIES}}
