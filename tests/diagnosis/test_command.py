"""`qwen-vram doctor`: what it prints, and its exit status."""

import json
import os

import pytest

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from tests.helpers.command import qwen_vram

pytestmark = pytest.mark.torch  # the command's process is forked from one that has imported torch


def test_json_is_one_object_and_nothing_else():
    ended = qwen_vram("doctor", CHECKPOINT, "--json")
    data = json.loads(ended.stdout)
    assert ended.stderr == ""
    assert ended.returncode == bool(data["findings"])
    assert (data["model"]["kind"], data["model"]["weight_bytes"]) == ("qwen2", qv.estimate_vram(CHECKPOINT).weights)
    assert data["workload"]["prompt_len"] == 4096 - 512


def test_nothing_found_is_status_0_and_a_finding_is_status_1(monkeypatch):
    good = qwen_vram("doctor", CHECKPOINT)
    assert good.returncode == 0, good.stdout
    assert "nothing found by" in good.stdout
    bad = qwen_vram("doctor", "Qwen2.5-72B-Instruct")
    assert bad.returncode == 1
    assert "are missing" in bad.stdout
    assert "### qwen-vram doctor" in bad.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["Qwen9"], "unknown model 'Qwen9'"),
        ([CHECKPOINT, "--prompt-len", "5000"], "past the model's max_position_embeddings 4096"),
        (["--batch-size", "0"], "batch_size must be a positive whole number, got 0"),
        (["--no-such-option"], "No such option"),
    ],
    ids=str,
)
def test_a_wrong_call_is_status_2(words, text):
    ended = qwen_vram("doctor", *words)
    assert ended.returncode == 2
    assert text in " ".join(ended.stderr.replace("│", " ").split())


def test_a_wrong_call_with_json_is_an_object_too():
    ended = qwen_vram("doctor", "Qwen9", "--json")
    assert ended.returncode == 2
    assert json.loads(ended.stdout)["error"] == "UnknownNameError"


def test_the_users_name_is_not_printed(monkeypatch):
    monkeypatch.setenv("USER", "wandaq")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"# {os.path.expanduser('~')} wandaq")
    ended = qwen_vram("doctor", "--json")
    assert "wandaq" not in ended.stdout
    assert "# <home> <user>" in ended.stdout
