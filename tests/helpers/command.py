"""The command line, or code, in a process of its own, forked from one that has imported torch and transformers."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

# What the process has imported that others are forked from; whichever helper is first starts it. Typer imports the last
# five as it runs a command, 0.13 s.
PRELOADED = [
    "qwen_vram.cli",
    "qwen_vram.runtime.loading.load",
    "transformers.models.qwen2.modeling_qwen2",
    "bitsandbytes",
    "fastapi",
    "uvicorn",
    "pydantic.json_schema",
    "pydantic.type_adapter",
    "typer._adapters",
    "rich.status",
    "zoneinfo",
]
_FLAGS = {"in": os.O_RDONLY, "out": os.O_WRONLY | os.O_CREAT, "err": os.O_WRONLY | os.O_CREAT}


def qwen_vram(*arguments: object, stdin: str = "", timeout: float = 300) -> CompletedProcess[str]:
    """`python -m qwen_vram ARGUMENTS`, without the seconds that the imports take. The environment is this one's."""
    return _forked(_command_line, [str(one) for one in arguments], dict(os.environ), stdin, timeout)


def python(
    code: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
    timeout: float = 300,
) -> CompletedProcess[str]:
    """`python -c CODE ARGUMENTS`, likewise. huggingface_hub is as if it were imported with this environment."""
    given = dict(os.environ) if environment is None else environment
    return _forked(_code, [code, *arguments], given, "", timeout, directory)


def _forked(
    run: Callable[[list[str]], None],
    words: list[str],
    environment: dict[str, str],
    stdin: str,
    timeout: float,
    directory: Path | None = None,
) -> CompletedProcess[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory(prefix="qwen_vram_command_") as folder:
        (Path(folder) / "in").write_text(stdin, encoding="utf-8")
        given = (run, words, folder, str(directory or os.getcwd()), environment)
        process = context.Process(target=_main, args=given, daemon=True)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutExpired(words, timeout)
        out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return CompletedProcess(words, process.exitcode, out, err)


def _main(
    run: Callable[[list[str]], None], words: list[str], folder: str, directory: str, environment: dict[str, str]
) -> None:
    for descriptor, (name, flags) in enumerate(_FLAGS.items()):
        opened = os.open(Path(folder) / name, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    try:
        run(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _command_line(words: list[str]) -> None:
    sys.argv = ["qwen-vram", *words]
    from qwen_vram.cli import main

    main()


def _code(words: list[str]) -> None:
    code, *arguments = words
    sys.argv = ["-c", *arguments]
    from huggingface_hub import constants, hf_api

    importlib.reload(constants)  # its modules read this one, but for the object behind its functions
    hf_api.api.endpoint = constants.ENDPOINT
    exec(code, {"__name__": "__main__"})
