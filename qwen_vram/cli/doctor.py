"""`qwen-vram doctor`: find what costs memory or time on this machine and in a checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import qwen_vram as qv
from qwen_vram.cli.consoles import console
from qwen_vram.cli.options import AsJson, BatchSize, NewTokens, Padded

_STYLES = {"high": "bold red", "medium": "yellow", "low": "cyan"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="Catalog name, checkpoint folder or hub id; without one, this machine alone."),
    ] = None,
    prompt_len: Annotated[
        int | None, typer.Option(help="Prompt tokens for which costs are; default: 4,096, or the model's most.")
    ] = None,
    max_new_tokens: NewTokens = 512,
    batch_size: BatchSize = 1,
    padded: Padded = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time copies to the GPU too, which takes a CUDA context for a moment.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find what costs memory or time here, with the cost and the fix; exit status 1 if something was found."""
    result = qv.doctor(
        model,
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        padded=padded,
        measure=measure,
    )
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        _show(result)
    if not result.is_good:
        raise SystemExit(1)


def _show(result: qv.Diagnosis) -> None:
    """Print the findings, and the report to paste."""
    for line in str(result).splitlines():
        style = _STYLES.get(line.partition(":")[0])
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    title = "Report to paste into an issue, without names of hosts and users, tokens and home folders:"
    console.print(f"\n{title}\n", style="dim", soft_wrap=True)
    console.print(result.report(), markup=False, highlight=False, soft_wrap=True)
