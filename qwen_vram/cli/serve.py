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
from qwen_vram.cli.vllm import (
    PipelineParallel,
    TensorParallel,
    VllmCheckpoint,
    VllmPath,
    check_engine,
    serve_with_vllm,
    set_up_vllm,
)
from qwen_vram.serving.concurrency import AUTO, plan_to_serve, wanted
from qwen_vram.units import parse_bytes

_KEY = "QWEN_VRAM_API_KEY"


def serve(
    model: Annotated[str | None, typer.Argument(help="Catalog name, checkpoint folder or hub id.")] = None,
    vram: Vram = None,
    ram: Ram = None,
    reserve: Reserve = None,
    profile: Annotated[str, typer.Option(help="auto, " + ", ".join(qv.PROFILES))] = "auto",
    prefer: Prefer = "quality",
    prompt_len: PromptLen = 2048,
    max_new_tokens: NewTokens = 512,
    concurrency: Annotated[
        str, typer.Option(help="Requests at once: a number, or auto, the most up to 16 that cost no precision.")
    ] = "auto",
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
    grace: Annotated[float, typer.Option(help="Seconds for running requests after SIGTERM or Ctrl-C.")] = 30.0,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let web pages of this origin read answers; * is all.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name in the Host header; default: those of this machine.")
    ] = None,
    engine: Annotated[str, typer.Option(help="own, or vllm.")] = "own",
    vllm: VllmPath = None,
    vllm_checkpoint: VllmCheckpoint = None,
    batch_size: Annotated[int, typer.Option(help="With --engine vllm: sequences at once.")] = 1,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    setup_vllm: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Make an environment with vLLM in a new folder, and leave.")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients, until SIGTERM or Ctrl-C."""
    if setup_vllm is not None:
        set_up_vllm(setup_vllm)
        return
    if model is None:
        raise qv.WorkloadError("serve needs a model: a catalog name, a folder or a hub id", name="model", got=None)
    given = {
        "--vllm": vllm,
        "--vllm-checkpoint": vllm_checkpoint,
        "--batch-size": None if batch_size == 1 else batch_size,
        "--tensor-parallel": tensor_parallel,
        "--pipeline-parallel": pipeline_parallel,
    }
    check_engine(engine, given)
    at_once = wanted(concurrency)
    if engine == "vllm" and at_once != AUTO:
        raise qv.WorkloadError(
            f"--concurrency {at_once} is for --engine own; with --engine vllm, --batch-size is the number of sequences "
            "at once",
            name="concurrency",
            got=at_once,
        )
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
    if engine == "vllm":
        plan = qv.plan(model, **arguments, batch_size=batch_size)  # type: ignore[arg-type]
        show_steps(plan)
        serve_with_vllm(
            plan,
            settings,
            program=vllm,
            checkpoint=vllm_checkpoint,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
        )
        return
    served = plan_to_serve(model, at_once, arguments)
    show_steps(served.plan)
    show_estimate(served.plan.estimate)
    print("\n".join([*served.plan.notes, *served.lines]))
    hidden = {model, str(folder.absolute()), str(folder.resolve()), os.path.expanduser("~")}
    run_server(
        lambda: qv.load(model, progress=False, concurrency=served.concurrency, **arguments),  # type: ignore[arg-type]
        settings,
        hidden=hidden if folder.is_dir() else {os.path.expanduser("~")},
        listening=lambda address: print(f"listening on {address}", flush=True),
    )
