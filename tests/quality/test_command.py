"""`qwen-vram check`: what it prints, and its exit status."""

import json

import pytest

from tests.helpers.command import qwen_vram

SMALL = ("--texts", "2", "--text-tokens", "64", "--questions", "2", "--categories", "math,table", "--device", "cpu")


def test_json_is_one_object_and_nothing_else(demo, tmp_path):
    ended = qwen_vram("check", demo, *SMALL, "--set", "weights=nf4", "--logits", tmp_path, "--json")
    data = json.loads(ended.stdout)
    assert ended.stderr == ""
    assert ended.returncode == (not data["is_good"])
    assert data["settings"]["weights"] == "nf4"
    assert data["tasks"] == "demo"
    assert set(data["distance"]["mean_kl"]) == {"value", "low", "high"}
    assert 0 < data["distance"]["tokens"] <= 64
    assert list(data["questions"]["categories"]) == ["math", "table", "total"]
    assert data["questions"]["categories"]["total"]["asked"] == len(data["questions"]["answers"]) == 4


def test_the_text_has_the_verdict_and_the_shares(demo, tmp_path):
    ended = qwen_vram("check", demo, *SMALL, "--set", "weights=bf16", "--logits", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"distance from {demo}: identical" in ended.stdout
    assert " ".join(ended.stdout.split("math")[1].split()[:4]) == "2 of 2 100.0%"


def test_a_poor_model_is_status_1(demo, untied, tmp_path):
    """Random weights are far from the trained model with the same vocabulary."""
    ended = qwen_vram(
        "check", untied, "--against", demo, "--measure", "distance", *SMALL, "--logits", tmp_path, "--json"
    )
    assert ended.returncode == 1, ended.stderr
    assert json.loads(ended.stdout)["distance"]["verdict"] == "poor"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--questions", "0"], "questions must be a whole number from 1 to"),
        (["--categories", "poems"], "unknown category 'poems'"),
        (["--measure", "speed"], "unknown measure 'speed'"),
        (["--set", "weight=nf4"], "unknown knob 'weight'"),
        (["--no-such-option"], "No such option"),
    ],
    ids=str,
)
def test_a_wrong_call_is_status_2(demo, words, text):
    ended = qwen_vram("check", demo, *words)
    assert ended.returncode == 2
    assert text in " ".join(ended.stderr.replace("│", " ").split())
