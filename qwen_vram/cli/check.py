"""`qwen-vram check`: distance from the 16-bit model, and questions with known answers."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qwen_vram as qv
from qwen_vram.cli.consoles import console, errors
from qwen_vram.cli.options import AsJson, Knobs, Vram, budgets, parsed_knobs


def check(
    model: Annotated[str, typer.Argument(help="Catalog name, checkpoint folder or hub id.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The 16-bit reference; default: the same model unquantized.")
    ] = None,
    profile: Annotated[str, typer.Option(help="The profile to check, as of qwen-vram plan.")] = "auto",
    settings: Knobs = None,
    vram: Vram = None,
    measure: Annotated[str, typer.Option(help="all, distance or questions.")] = "all",
    questions: Annotated[int, typer.Option(help="Questions of each category.")] = 40,
    categories: Annotated[
        str | None, typer.Option(help="Of chinese, math, code, table, recall, with commas between; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other questions and documents.")] = 0,
    texts: Annotated[int, typer.Option(help="Documents of the distance.")] = 16,
    text_tokens: Annotated[int, typer.Option(help="Tokens of a document; the second half is scored.")] = 512,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter that runs beside the model.")] = None,
    against_adapter: Annotated[str | None, typer.Option(help="LoRA adapter that runs beside the reference.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the GPU if there is one.")] = None,
    logits: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Keep the reference's logits there; default: the user's cache.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model's distance from its 16-bit reference, and ask it questions; exit status 1 if it is poor."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("load", total=None)

        def on_progress(step: str, done: int, of: int) -> None:
            progress.update(task, completed=done, total=of, description=step)

        found = qv.check(
            model,
            against=against,
            profile=profile,
            vram=cast("Any", budgets(vram)),
            measure=cast("Any", measure),
            questions=questions,
            categories=None if categories is None else [name.strip() for name in categories.split(",")],
            seed=seed,
            texts=texts,
            text_tokens=text_tokens,
            adapter=adapter,
            against_adapter=against_adapter,
            device=device,
            logits=logits,
            on_progress=on_progress,
            **parsed_knobs(settings),
        )
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if not found.is_good:
        raise SystemExit(1)
