"""The benchmark on a GPU: every configuration, its process memory as predicted."""

from functools import partial

import pytest

import qwen_vram as qv
from qwen_vram.tools.accuracy import make_checkpoint
from qwen_vram.tools.fresh_process import call_each

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, made in another process: this one takes no memory of the GPU."""
    folder = tmp_path_factory.mktemp("bench") / "Qwen2.5-1.5B"
    (made,) = call_each(partial(make_checkpoint, folder=folder), ["Qwen2.5-1.5B"])
    assert not made.error, made.error
    return folder


def test_the_process_takes_what_was_predicted(checkpoint, tmp_path):
    found = qv.bench(checkpoint, max_new_tokens=64, vram="2GiB", out=tmp_path / "rows.jsonl", timeout=200)
    assert not found.failed, found.markdown()
    assert len(found.rows) == 10
    print(found.markdown())
    for row in found.rows:
        assert row.measured["weights"] == row.predicted["weights"], row.configuration
        assert row.measured["process_total"] is not None
        assert -0.01 <= row.deviation("process_total") <= 0.03, row.configuration
        assert -0.01 <= row.deviation("peak") <= 0.03, row.configuration
        if row.by == "qwen_vram":
            assert row.measured["process_total"] <= row.promised, row.configuration
