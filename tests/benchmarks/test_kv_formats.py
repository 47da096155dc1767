"""`benchmarks/kv_formats.py`, run as it is run, on the bundled checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.tools.fresh_process import Ended

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kv_formats.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import kv_formats

    yield kv_formats
    for name in ("kv_formats", "cells", "caps"):
        sys.modules.pop(name, None)


def run(script, monkeypatch, out, *options):
    """The script's exit status, with every cell in this process."""
    monkeypatch.setattr("cells.call_each", lambda function, items: (Ended(one, function(one)) for one in items))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), *options])
    return script.main()


@pytest.mark.slow
@pytest.mark.full
def test_a_row_for_each_cache_and_none_twice(demo, tmp_path, script, monkeypatch):
    out = tmp_path / "rows.jsonl"
    options = ("--checkpoint", str(demo), "--prompts", "300", "--new", "4")
    assert run(script, monkeypatch, out, *options) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    by_cache = {row["cell"].get("kv_cache", row["cell"].get("kv_device")): row for row in rows}
    assert list(by_cache) == ["bf16", "int8", "int4", "host"]
    for row in rows:
        cell = dict(row["cell"])
        promised = qv.estimate_vram(cell.pop("model"), cache="preallocated", **cell)
        assert row["kv_cache"] == promised.kv_cache
        assert row["prefill_s"] > 0 < row["ms_per_token"]
    for name in ("bf16", "host"):
        assert by_cache[name]["error_after_prefill"] == by_cache[name]["error_after_decode"] == 0
    for name in ("int8", "int4"):
        assert 0 < by_cache[name]["error_after_prefill"] < 0.1
        assert 0 < by_cache[name]["error_after_decode"] < 0.1
    # A run that broke off goes on: one row is missing, and one is made. In processes of their own, as users run it.
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    command = [sys.executable, str(SCRIPT), str(out), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[:3] == rows[:3]
    assert [row["cell"] for row in again[3:]] == [rows[3]["cell"]]


def test_what_cannot_run_is_refused(demo, tmp_path, script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(script, monkeypatch, tmp_path / "rows.jsonl", "--checkpoint", str(demo), "--new", "1")
    assert caught.value.code == 2
    assert "a decode step needs --new of 2 or more" in capsys.readouterr().err
