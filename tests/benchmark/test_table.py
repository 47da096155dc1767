"""Tables and pictures of rows, and files of them."""

import json
from dataclasses import replace

import pytest

import qwen_vram as qv
from qwen_vram.benchmark.configurations import CLAIMS, configurations
from qwen_vram.monitor.log import Log, LogError

GIB = 2**30
ROW = qv.BenchmarkRow(
    model="Qwen2.5-7B", configuration="default", about="", by="qwen_vram", prompt_len=512, max_new_tokens=512,
    batch_size=1, device="NVIDIA H200", on_cpu=False, versions={"torch": "2.11"}, date="2026-12-01",
    predicted={"weights": 14 * GIB, "process_total": 16 * GIB, "ms_per_token": 20.0},
    measured={"weights": 14 * GIB, "process_total": 15 * GIB, "ms_per_token": 25.04, "tokens_per_joule": 0.1234},
)  # fmt: skip
FAILED = replace(ROW, configuration="speed", predicted={}, measured={}, error="OutOfMemoryError: 20 GiB")


def test_markdown_has_predicted_beside_measured_figures_and_the_article():
    text = qv.Benchmark((ROW, FAILED)).markdown()
    assert text.startswith("Qwen2.5-7B, 512 + 512 tokens, batch 1, on NVIDIA H200, torch 2.11, 2026-12-01:\n")
    assert (
        "| `default` | 14.00 / 14.00 | - / - | - / - | 16.00 / 15.00 | +6.7% | - / - | 20.0 / 25.0 | - | 0.123 |"
        in text
    )
    assert "| `speed` | failed |" in text
    assert "- `speed` failed: OutOfMemoryError: 20 GiB" in text
    assert "| `default` | article: FP16, default | 15.2 | 4.8 | 19.5 | 82 |" in text
    assert "| `default` | measured | 15.03 | - | 16.11 | 25.0 |" in text


@pytest.mark.parametrize("other", [{"prompt_len": 256}, {"batch_size": 2}, {"on_cpu": True}, {"error": "no"}], ids=str)
def test_the_article_stands_beside_its_own_workload_only(other):
    assert "article" not in qv.Benchmark((replace(ROW, **other),)).markdown()


def test_the_articles_rows_are_those_of_the_page():
    """The page has the totals in GB."""
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "article.md").read_text()
    assert f"FP16 total ~{CLAIMS['default'].process_total / 1e9} GB" in page
    assert f"INT4 total ~{CLAIMS['int4-flash'].process_total / 1e9} GB" in page
    assert f"weights {CLAIMS['cpu-offload'].weights / 1e9} GB" in page
    milliseconds = [claim.ms_per_token for claim in CLAIMS.values()]
    assert "({}, {} and {} ms per token)".format(*milliseconds) in page


def test_every_configuration_has_a_plan_that_counts_it():
    architecture = qv.estimate_vram("Qwen2.5-7B").architecture
    every = configurations(architecture, ["8GiB", 4 * GIB])
    assert [one.name for one in every][-3:] == ["plan", "plan-8.00GiB", "plan-4.00GiB"]
    for one in every:
        plan = qv.plan("Qwen2.5-7B", **{"vram": "80GiB", "ram": "64GiB", **one.arguments})
        assert plan.estimate.process_total > 0
    (streamed,) = [one for one in every if one.name == "streamed"]
    assert streamed.arguments["streamed_layers"] == 14
    with pytest.raises(qv.UnitError, match="vram"):
        configurations(architecture, ["8"])


def test_a_picture_is_drawn_and_one_of_nothing_refused(tmp_path):
    pytest.importorskip("matplotlib")
    qv.Benchmark((ROW, FAILED, replace(ROW, prompt_len=64))).plot(tmp_path / "rows.svg")
    text = (tmp_path / "rows.svg").read_text()
    assert text.startswith("<?xml")
    with pytest.raises(qv.WorkloadError, match="there is no row to draw"):
        qv.Benchmark((FAILED,)).plot(tmp_path / "nothing.svg")
    assert not (tmp_path / "nothing.svg").exists()


def test_a_file_keeps_the_newest_of_each_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Log(path) as log:
        for row in (FAILED, ROW, replace(FAILED, error=None)):
            log.write(row)
    with path.open("a") as file:
        file.write('{"model": "Qwen')
    speed, default = qv.read_benchmark(path)
    assert (speed.to_dict(), default.to_dict()) == (replace(FAILED, error=None).to_dict(), ROW.to_dict())
    assert default.deviation("process_total") == pytest.approx(1 / 15)


@pytest.mark.parametrize("line", ["{}", "[]", "x", json.dumps({**ROW.to_dict(), "more": 1})], ids=str)
def test_a_line_that_is_no_row_is_refused(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW.to_dict()) + "\n" + line + "\n")
    with pytest.raises(LogError, match="line 2 of .* is not a row of `qwen-vram bench --out`"):
        qv.read_benchmark(path)
