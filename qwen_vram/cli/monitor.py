"""`qwen-vram monitor` and `run`: watch GPU memory, alone or beside a program."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.live import Live

from qwen_vram.cli.consoles import console, errors
from qwen_vram.cli.options import AsJson
from qwen_vram.units import format_bytes

Every = Annotated[str, typer.Option(help="Time between two samples, such as 10s, 500ms or 2min.")]
LogFile = Annotated[str | None, typer.Option("--log", help="Append each sample to this file, as a JSON line.")]


def monitor(
    every: Every = "10s",
    once: Annotated[bool, typer.Option("--once", help="Print one sample and leave.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: one object with --once, else a line for each sample.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one line for each process.")] = False,
    log: LogFile = None,
    read: Annotated[str | None, typer.Option(metavar="LOG", help="Print the peaks of a log; watch nothing.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="With --read: draw the log (.svg, .png).")] = None,
) -> None:
    """Show GPU memory, its processes, and the plans of models that this library loaded, until Ctrl-C."""
    from qwen_vram.monitor.monitor import Monitor
    from qwen_vram.monitor.sample import Sample
    from qwen_vram.monitor.tables import csv_rows, tables

    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv do not go together")
    if plot is not None and read is None:
        raise typer.BadParameter("--plot needs --read LOG")
    if read is not None:
        _summarize(read, plot, as_json)
        return
    watched = Monitor(every, log=log, keep=1)
    lines = 0

    def show(sample: Sample) -> None:
        nonlocal lines
        if as_json:
            print(json.dumps(sample.to_dict()), flush=True)
        elif as_csv:
            print(csv_rows(sample, header=not lines), end="", flush=True)
        elif live is not None:
            live.update(tables(sample, watched.peak), refresh=True)
        else:
            console.print(tables(sample, watched.peak))
        lines += 1

    live = None
    if console.is_terminal and not (once or as_json or as_csv):
        live = Live(console=console, auto_refresh=False)
    if once:
        watched.once(show)
        return
    watched.on_sample = show
    try:
        if live is not None:
            live.start()
        with watched:
            watched.wait()
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the end that users choose
    finally:
        if live is not None:
            live.stop()


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The program with its arguments.")],
    every: Every = "10s",
    log: LogFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no peaks at the end.")] = False,
) -> None:
    """Run a program, watch memory meanwhile, and end with its exit status."""
    from qwen_vram.monitor.monitor import Monitor
    from qwen_vram.monitor.run import CommandError
    from qwen_vram.monitor.run import run as run_watched

    watched = Monitor(every, log=log, keep=1)
    try:
        status = run_watched(command, watched)
    except CommandError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(error.status) from None
    if not quiet:
        for name, nbytes in watched.peak.items():
            print(f"qwen-vram: at most {format_bytes(nbytes)} used on {name}", file=sys.stderr)
    raise SystemExit(status)


def _summarize(log: str, plot: str | None, as_json: AsJson) -> None:
    from qwen_vram.monitor.log import read_log
    from qwen_vram.monitor.summary import summary_of

    samples = read_log(log)
    found = summary_of(samples)
    if plot is not None:
        from qwen_vram.monitor.plot import plot_log

        plot_log(samples, plot)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print(f"{found.samples:,} samples from {found.first} to {found.last}" if found.samples else "no sample")
    for device, nbytes in found.peak.items():
        print(f"{device}: at most {format_bytes(nbytes)} of {format_bytes(found.total[device])}")
    for one in found.plans:
        used = "unknown" if one.peak is None else format_bytes(one.peak)
        promised = "" if one.promised is None else f", promised {format_bytes(one.promised)}"
        print(f"{one.model} in process {one.pid}: at most {used}{promised}")
