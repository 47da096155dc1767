"""Options about vLLM of `qwen-vram plan` and `serve`, and the server in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import qwen_vram as qv
from qwen_vram.cli.consoles import errors

if TYPE_CHECKING:
    from qwen_vram.serving.web.settings import Settings

_ENGINES = ("own", "vllm")

VllmPath = Annotated[
    str | None, typer.Option(metavar="PATH", help="The program vllm, or the folder of its environment.")
]
VllmCheckpoint = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="GPTQ, AWQ or compressed-tensors checkpoint of the model for vLLM.")
]
TensorParallel = Annotated[int | None, typer.Option(help="With vLLM: workers that share each layer.")]
PipelineParallel = Annotated[int | None, typer.Option(help="With vLLM: groups of workers with consecutive layers.")]


def check_engine(engine: str, given: Mapping[str, object]) -> None:
    """Refuse an unknown engine, and options of vLLM without it."""
    if engine not in _ENGINES:
        raise qv.UnknownNameError("--engine", engine, _ENGINES)
    others = [name for name, value in given.items() if value is not None]
    if engine == "own" and others:
        raise qv.WorkloadError(
            f"{', '.join(others)} is for vLLM alone; add --engine vllm, or leave it out", name=others[0], got=engine
        )


def set_up_vllm(folder: Path) -> None:
    """Make an environment with vLLM, and print the option that uses it."""
    from qwen_vram.serving.vllm.environment import set_up

    set_up(folder.expanduser().absolute(), lambda line: errors.print(line, markup=False, highlight=False))
    print(f"--engine vllm --vllm {folder}")


def serve_with_vllm(
    plan: qv.Plan,
    settings: Settings,
    *,
    program: str | None,
    checkpoint: str | None,
    tensor_parallel: int | None,
    pipeline_parallel: int | None,
) -> None:
    """Serve a plan by vLLM until SIGTERM or Ctrl-C."""
    from qwen_vram.planning.vllm.arguments import VllmArguments, memory_line
    from qwen_vram.serving.vllm.environment import program_in
    from qwen_vram.serving.vllm.server import serve_vllm

    def arguments(port: int) -> VllmArguments:
        return plan.to_vllm(
            checkpoint=checkpoint,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            port=port,
            served_model_name=settings.name,
        )

    executable = program_in(program)

    def shown(given: VllmArguments) -> None:
        print("\n".join((*given.notes, memory_line(given.memory), str(given.command(executable)))), flush=True)

    serve_vllm(
        arguments,
        executable,
        settings,
        listening=lambda address: print(f"listening on {address}", flush=True),
        shown=shown,
    )
