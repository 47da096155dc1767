"""`qwen-vram serve`: a server that speaks the protocol of OpenAI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import qwen_vram as qv
from qwen_vram.cli.options import (
    Adapter,
    Knobs,
    Model,
    NewTokens,
    Prefer,
    PromptLen,
    Ram,
    Reserve,
    Vram,
    budgets,
    parsed_knobs,
)
from qwen_vram.cli.show import show_estimate, show_steps
from qwen_vram.units import parse_bytes

_KEY = "QWEN_VRAM_API_KEY"


def serve(
    model: Model,
    vram: Vram = None,
    ram: Ram = None,
    reserve: Reserve = None,
    profile: Annotated[str, typer.Option(help="auto, " + ", ".join(qv.PROFILES))] = "auto",
    prefer: Prefer = "quality",
    prompt_len: PromptLen = 2048,
    max_new_tokens: NewTokens = 512,
    adapter: Adapter = None,
    knobs: Knobs = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help=f"Key that each request must have; better in the variable {_KEY}.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model in requests and answers.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Most requests in the queue; the next ones get 429.")] = 100,
    max_wait: Annotated[float, typer.Option(help="Most seconds in the queue; then a request gets 503.")] = 600.0,
    max_body: Annotated[str, typer.Option(help="Most bytes of a request.")] = "4MiB",
    heartbeat: Annotated[float, typer.Option(help="Seconds of silence after which a stream gets a comment.")] = 15.0,
    grace: Annotated[float, typer.Option(help="Seconds for the running request after SIGTERM or Ctrl-C.")] = 30.0,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let web pages of this origin read answers; * is all.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name in the Host header; default: those of this machine.")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients, one request at a time, until SIGTERM or Ctrl-C."""
    from qwen_vram.serving.web.server import check_installed
    from qwen_vram.serving.web.server import serve as run_server
    from qwen_vram.serving.web.settings import Settings

    check_installed()
    folder = Path(model)
    settings = Settings(
        name=served_model_name or (folder.resolve().name if folder.is_dir() else model),
        host=host,
        port=port,
        api_key=api_key or os.environ.get(_KEY) or None,
        max_waiting=max_waiting,
        max_wait=max_wait,
        max_body=parse_bytes(max_body, name="--max-body"),
        heartbeat=heartbeat,
        grace=grace,
        origins=tuple(cors or ()),
        allowed_hosts=tuple(allowed_host or ()),
    )
    arguments: dict[str, object] = {
        "profile": profile,
        "vram": budgets(vram),
        "ram": ram,
        "reserve": reserve,
        "prefer": prefer,
        "prompt_len": prompt_len,
        "max_new_tokens": max_new_tokens,
        "adapter": adapter,
        **parsed_knobs(knobs),
    }
    plan = qv.plan(model, **arguments)  # type: ignore[arg-type]
    show_steps(plan)
    show_estimate(plan.estimate)
    hidden = {model, str(folder.absolute()), str(folder.resolve()), os.path.expanduser("~")}
    run_server(
        lambda: qv.load(model, progress=False, **arguments),  # type: ignore[arg-type]
        settings,
        hidden=hidden if folder.is_dir() else {os.path.expanduser("~")},
        listening=lambda address: print(f"listening on {address}", flush=True),
    )
