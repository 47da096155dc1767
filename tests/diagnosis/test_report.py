"""The report to publish: it names no host, user, token or folder. And the JSON, field by field."""

import ast
import getpass
import json
import re
import shutil
import socket
import sys
from dataclasses import replace
from subprocess import run

import pytest

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.diagnosis.redaction import redacted
from tests.helpers.machines import RTX_4090, VERSIONS, WITH_H100
from tests.hygiene import layout

PAGE = (layout.MAP.parent / "doctor.md").read_text(encoding="utf-8")
TOKEN = "hf_QwErTyUiOpAsDfGhJkLzXcVb"
SECRET = "correct-horse-battery"
HOST, USER = "gpu-box-17", "wandaq"


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """A host, a user and secrets, and a checkpoint in a folder that is named after all of them."""
    home = tmp_path / "home" / USER
    folder = home / f"{HOST}-models" / f"{USER}-{TOKEN}"
    shutil.copytree(CHECKPOINT, folder)
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.lab.example.org")
    for name, value in {"USER": USER, "HOME": str(home), "HF_TOKEN": TOKEN, "WANDB_API_KEY": SECRET}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"backend:native,# {home}/{SECRET}")
    return folder


def texts_of(result):
    return {"report": result.report(), "text": str(result), "json": json.dumps(result.to_dict())}


def test_the_texts_name_no_host_user_token_or_folder(planted):
    machine = replace(
        WITH_H100,
        gpus=(RTX_4090, replace(RTX_4090, width=4)),
        settings={"PYTORCH_ALLOC_CONF": f"# {planted} {SECRET} {HOST}", "CUDA_LAUNCH_BLOCKING": "1"},
    )
    for model in (planted, str(planted), None):
        result = qv.doctor(model, machine=machine)
        assert "launch-blocking" in {one.code for one in result.findings}
        for name, text in texts_of(result).items():
            for word in (HOST, USER, TOKEN, SECRET, "/home/", str(planted.parent), "example.org"):
                assert word not in text, (name, word)


def test_the_texts_of_this_machine_name_neither_its_host_nor_its_user(planted, monkeypatch):
    monkeypatch.undo()
    for text in texts_of(qv.doctor(planted)).values():
        words = set(re.findall(r"[A-Za-z0-9_.-]+", text))
        assert socket.gethostname() not in words
        assert getpass.getuser() not in words
        assert TOKEN not in text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("loaded /home/ann/x/y", "loaded <home>/x/y"),
        (r"in C:\Users\Ann\models", r"in <home>\models"),
        ("/mnt/c/Users/ann/models", "<home>/models"),
        ("key hf_abcdefghijkl, sk-abcdef0123456789", "key <token>, <token>"),
        ("ghp_abcdefghijklmnop github_pat_11ABCDEFG_x", "<token> <token>"),
        ("https://ann:secret@host.org/x", "https://<token>@host.org/x"),
        ("Qwen/Qwen2.5-7B-Instruct needs 15.23 GB", "Qwen/Qwen2.5-7B-Instruct needs 15.23 GB"),
    ],
)
def test_forms_of_tokens_and_home_folders(text, clean):
    assert redacted(text) == clean


def test_an_account_on_the_hub_is_not_named():
    config = {"_name_or_path": "someone/private-model", "model_type": "qwen2"}
    result = qv.doctor("Qwen2.5-7B-Instruct", machine=WITH_H100)
    assert "Qwen/Qwen2.5-7B-Instruct" in result.report()
    private = replace(result, model=replace(result.model, label=config["_name_or_path"]))
    for text in texts_of(private).values():
        assert "<account>/private-model" in text or "private-model" not in text
        assert "someone" not in text


def test_a_machine_without_torch_is_named_as_such():
    versions = {name: one for name, one in VERSIONS.items() if name not in ("torch", "triton")}
    result = qv.doctor(machine=replace(WITH_H100, versions=versions))
    assert "torch is not installed: only the machine and stored models were examined" in result.report()


def test_the_command_needs_no_torch():
    code = "import tests.helpers.no_torch, sys; sys.argv = {}; from qwen_vram.cli import main; main()"
    for words in (["qwen-vram", "doctor"], ["qwen-vram", "doctor", str(CHECKPOINT)]):
        ended = run([sys.executable, "-c", code.format(words)], capture_output=True, text=True, timeout=60)
        assert ended.returncode in (0, 1), ended.stderr
        assert "### qwen-vram doctor" in ended.stdout


def rows_of(section):
    """The first cells of a section's table."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", text, re.M))


def names_of(cells):
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_page_describes_each_code():
    found = set()
    for name, path in layout.modules().items():
        if name.startswith("diagnosis/checks/"):
            for node in ast.walk(layout.parsed(path)):
                value = getattr(node, "value", None)
                if isinstance(node, ast.Constant) and isinstance(value, str):
                    found |= set(re.findall(r"^[a-z0-9]+(?:-[a-z0-9]+)+$", value))
    found |= {"gradients", "memlock", "swapped", "version-torch", "version-bitsandbytes"}
    found -= {"flash-linear-attention"}
    assert names_of(rows_of("Findings")) == found


def fields_of(data, prefix=""):
    for name, value in data.items():
        yield prefix + name
        if isinstance(value, dict) and name not in ("versions", "settings"):
            yield from fields_of(value, f"{prefix}{name}.")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from fields_of(value[0], f"{prefix}{name}[].")


def test_the_page_describes_each_field():
    machine = replace(WITH_H100, settings={"CUDA_LAUNCH_BLOCKING": "1"})
    data = qv.doctor("Qwen2.5-7B-Instruct", machine=machine).to_dict()
    assert set(fields_of(data)) - {"model", "machine", "workload"} == names_of(rows_of("Fields of `--json`"))
