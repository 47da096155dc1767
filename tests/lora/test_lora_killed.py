"""Killed or interrupted at any instant, a merge leaves no partial output, and the next run completes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from tests.helpers.lora_models import make_adapter, make_base

SCRIPT = Path(__file__).parents[1] / "helpers" / "lora_killed.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of a few shards, so that there is something to be interrupted in."""
    root = tmp_path_factory.mktemp("killed")
    base = make_base(root / "base", vocab_size=5000, hidden_size=128, intermediate_size=512, num_hidden_layers=2)
    return base, make_adapter(base, root / "adapter", target_modules="all-linear")


def killed(pair: tuple[Path, Path], folder: Path, signal: str, count: int) -> list[dict[str, object]]:
    command = [sys.executable, SCRIPT, signal, folder, *pair, str(count)]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=120)
    outcomes: list[dict[str, object]] = json.loads(finished.stdout.splitlines()[-1])
    assert len(outcomes) == count
    return outcomes


def check(outcomes: list[dict[str, object]]) -> None:
    for outcome in outcomes:
        allowed = ("earlier", "new") if outcome["earlier"] else ("nothing", "new")
        assert outcome["what"] in allowed, outcome
        assert outcome["base"], outcome
        assert outcome["again"], outcome
        assert outcome["clean"], outcome
        assert set(outcome["left"]) <= {"out", ".out.partial", ".out.partial.lock"}, outcome


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.full)])
def test_killed_at_random_instants(pair, tmp_path, count):
    outcomes = killed(pair, tmp_path, "SIGKILL", count)
    check(outcomes)
    # The instants are spread over the whole run: many leave a folder half filled, some come too late.
    assert sum(".out.partial" in outcome["left"] for outcome in outcomes) >= count // 5
    assert {outcome["code"] for outcome in outcomes} <= {0, -9}


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.full)])
def test_interrupted_at_random_instants(pair, tmp_path, count):
    """Ctrl-C removes what is half done."""
    outcomes = killed(pair, tmp_path, "SIGINT", count)
    check(outcomes)
    assert {outcome["code"] for outcome in outcomes} <= {0, 130}
    assert 130 in {outcome["code"] for outcome in outcomes}
    for outcome in outcomes:
        assert set(outcome["left"]) <= {"out"}, outcome
