"""The command line `qwen-vram` and its commands.

They are `estimate`, `plan`, `fleet`, `chat`, `serve`, `merge`, `quantize`, `calibrate`, `doctor`, `bench`, `check`,
`monitor`, `run` and `demo`.

Modules:
    bench     `qwen-vram bench`: configurations of a model, predicted beside measured.
    chat      `qwen-vram chat`: a conversation with a model in the terminal.
    check     `qwen-vram check`: distance from the 16-bit model, and questions with known answers.
    consoles  Consoles of the commands: results on standard output, errors on standard error.
    doctor    `qwen-vram doctor`: find what costs memory or time on this machine and in a checkpoint.
    fleet     `qwen-vram fleet`: which GPUs, and how many, serve a number of users.
    machine   `qwen-vram calibrate` and `demo`: measure this machine, and show the bundled model.
    monitor   `qwen-vram monitor` and `run`: watch GPU memory, alone or beside a program.
    options   Options that several commands share, and the parsing of their values.
    plans     `qwen-vram estimate` and `plan`: predictions, without loading a model.
    serve     `qwen-vram serve`: a server that speaks the protocol of OpenAI.
    show      Tables of estimates and plans for the terminal.
    vllm      Options about vLLM of `qwen-vram plan` and `serve`, and the server in front of it.
    write     `qwen-vram merge` and `quantize`: the commands that write checkpoints.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

import qwen_vram as qv
from qwen_vram.cli.bench import bench
from qwen_vram.cli.chat import chat
from qwen_vram.cli.check import check
from qwen_vram.cli.consoles import errors
from qwen_vram.cli.doctor import doctor
from qwen_vram.cli.fleet import fleet
from qwen_vram.cli.machine import calibrate, demo
from qwen_vram.cli.monitor import monitor, run
from qwen_vram.cli.plans import estimate, plan
from qwen_vram.cli.serve import serve
from qwen_vram.cli.write import merge, quantize


def _print_version(asked: bool) -> None:
    if asked:
        print(f"qwen-vram {qv.__version__}")
        raise typer.Exit


app = typer.Typer(
    help="Run Qwen models in as little GPU memory as possible, and know the peak before you load.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before a command."""


for command in (estimate, plan, fleet, chat, serve, merge, quantize, calibrate, doctor, bench, check, monitor, demo):
    app.command()(command)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)


def main() -> None:
    """Run the command line; an error of this library is printed as one line, with exit status 2."""
    as_json = "--json" in sys.argv
    try:
        app()
    except qv.QwenVramError as error:
        if as_json:
            facts = {name: value for name, value in vars(error).items() if isinstance(value, (str, int, tuple, dict))}
            print(json.dumps({"error": type(error).__name__, "message": str(error), **facts}))
        else:
            errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
