"""Killed or interrupted at any instant, a merge leaves no partial output, and the next run completes."""

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")

from tests.helpers.forked import python
from tests.helpers.lora_models import make_adapter, make_base
from tests.helpers.shared import made_once

SCRIPT = Path(__file__).parents[1] / "helpers" / "lora_killed.py"


@pytest.fixture(scope="module", params=[(8, 4), pytest.param((50, 20), marks=pytest.mark.full)], ids=str)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Results by signal of so many merges that are killed, and so many that are interrupted, in one process.

    Their base has a few shards, so that there is something to be interrupted in.
    """
    counts = dict(zip(("SIGKILL", "SIGINT"), request.param))

    def kill(root: Path) -> None:
        base = make_base(root / "base", vocab_size=5000, hidden_size=128, intermediate_size=512, num_hidden_layers=2)
        adapter = make_adapter(base, root / "adapter", target_modules="all-linear")
        (root / "merged").mkdir()
        words = [f"{name}={count}" for name, count in counts.items()]
        finished = python(SCRIPT.read_text(encoding="utf-8"), root / "merged", base, adapter, *words)
        finished.check_returncode()
        (root / "outcomes.json").write_text(finished.stdout.splitlines()[-1])

    made = made_once(tmp_path_factory, f"killed {request.param}", kill)
    found: dict[str, list[dict]] = json.loads((made / "outcomes.json").read_text())
    assert {name: len(of_signal) for name, of_signal in found.items()} == counts
    return found


def check(outcomes: list[dict]) -> None:
    for outcome in outcomes:
        allowed = ("earlier", "new") if outcome["earlier"] else ("nothing", "new")
        assert outcome["what"] in allowed, outcome
        assert outcome["base"], outcome
        assert outcome["again"], outcome
        assert outcome["clean"], outcome
        assert set(outcome["left"]) <= {"out", ".out.partial", ".out.partial.lock"}, outcome


def test_killed_at_random_instants(outcomes):
    killed = outcomes["SIGKILL"]
    check(killed)
    # The instants are spread over the whole run: many leave a folder half filled, some come too late.
    assert sum(".out.partial" in outcome["left"] for outcome in killed) >= len(killed) // 5
    assert {outcome["code"] for outcome in killed} <= {0, -9}


def test_interrupted_at_random_instants(outcomes):
    """Ctrl-C removes what is half done."""
    interrupted = outcomes["SIGINT"]
    check(interrupted)
    assert {outcome["code"] for outcome in interrupted} <= {0, 130}
    assert 130 in {outcome["code"] for outcome in interrupted}
    for outcome in interrupted:
        assert set(outcome["left"]) <= {"out"}, outcome
