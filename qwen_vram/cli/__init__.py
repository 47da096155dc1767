"""The command line: `qwen-vram estimate`, `plan`, `chat`, `merge`, `quantize`, `calibrate`, `demo`."""

from __future__ import annotations

import json
import sys

import typer

import qwen_vram as qv
from qwen_vram.cli.chat import chat
from qwen_vram.cli.consoles import errors
from qwen_vram.cli.machine import calibrate, demo
from qwen_vram.cli.plans import estimate, plan
from qwen_vram.cli.write import merge, quantize

app = typer.Typer(
    help="Run Qwen models in as little GPU memory as possible, and know the peak before you load.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (estimate, plan, chat, merge, quantize, calibrate, demo):
    app.command()(command)


def main() -> None:
    """Run the command line; a refusal is one line and exit status 2."""
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
