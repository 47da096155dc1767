"""`qwen-vram calibrate` and `demo`: measure this machine, and show the bundled model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qwen_vram.cli.consoles import console
from qwen_vram.cli.options import AsJson


def calibrate(
    show: Annotated[bool, typer.Option("--show", help="Print what is stored and where; measure nothing.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Delete what is stored; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this GPU, CPU and disk once; estimates and plans use the figures from then on. A GPU is not needed."""
    from qwen_vram.checkpoints import machine_file
    from qwen_vram.tools.calibrate import calibrate as measure

    if show and reset:
        raise typer.BadParameter("--show and --reset do not go together")
    if reset:
        path, deleted = machine_file.cache_file(), machine_file.reset()
        text = f"deleted {path}" if deleted else f"nothing was stored at {path}"
        print(json.dumps({"path": str(path), "deleted": deleted}) if as_json else text)
        return
    if not show:
        measure(say=lambda line: None if as_json else print(line, flush=True))
    _show_machines(as_json)


def _show_machines(as_json: bool) -> None:
    """Print the machine that estimates use, its file, and the other machines in that file."""
    from qwen_vram.checkpoints.machine_file import cache_file, read
    from qwen_vram.spec.machine import DEFAULT

    stored = read()
    used = stored.machines[stored.current] if stored else DEFAULT
    others = [machine for machine in stored.machines.values() if machine != used] if stored else []
    if as_json:
        facts = {"path": str(cache_file()), "stored": stored is not None, "machine": used._asdict()}
        print(json.dumps({**facts, "others": [machine._asdict() for machine in others]}))
        return
    print(
        f"estimates use {cache_file()}" if stored else f"nothing stored at {cache_file()}; estimates use the defaults"
    )
    for machine in (used, *others):
        print(machine)


def demo() -> None:
    """Show the whole job offline: the article's numbers, the bundled model estimated, loaded, asked and measured."""
    from qwen_vram.tools.walkthrough import walk_through

    walk_through(console)
