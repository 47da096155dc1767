"""`qv.bench()` and `qwen-vram bench`: rows that run, rows that fail, files that continue, and wrong calls."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import qwen_vram as qv
from qwen_vram.benchmark.row import COMPARED, MEASURED
from qwen_vram.benchmark.token_times import TokenTimes
from qwen_vram.demo import CHECKPOINT
from tests.helpers.command import qwen_vram

WORK = {"prompt_len": 24, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Results of a row that runs."""
    path = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    found = qv.bench(CHECKPOINT, rows=["default"], device="cpu", out=path, **WORK)
    assert not found.failed, found.failed[0].error
    return path


def check(row):
    """A row that ran on the CPU has its figures, and the bytes of tensors are the predicted ones."""
    assert row.error is None
    assert tuple(row.to_dict()["predicted"]) == COMPARED
    assert tuple(row.to_dict()["measured"]) == MEASURED
    assert row.measured["weights"] == row.predicted["weights"]
    architecture = qv.estimate_vram(str(CHECKPOINT)).architecture
    a_token = row.predicted["kv_cache"] // (row.prompt_len + row.max_new_tokens) // row.batch_size
    # A growing cache never stores the last token.
    assert row.predicted["kv_cache"] - row.measured["kv_cache"] in (0, a_token * row.batch_size)
    assert a_token > architecture.num_hidden_layers
    # The process holds more than its tensors; what it takes beside them is not predicted on a CPU.
    assert row.measured["weights"] < row.measured["process_total"] <= 1.01 * row.measured["peak"]
    assert row.predicted["process_total"] is None
    assert row.promised is None
    assert 0 < row.measured["ms_per_token"] <= row.measured["ms_per_token_p90"]
    assert row.measured["first_token_ms"] > 0
    assert row.measured["tokens_per_joule"] is None
    assert row.predicted["ms_per_token"] > 0


def test_a_row_has_predicted_and_measured_figures(file):
    (row,) = qv.read_benchmark(file)
    assert (row.configuration, row.by, row.prompt_len, row.max_new_tokens) == ("default", "qwen_vram", 24, 6)
    assert row.call.startswith("qv.load(")
    check(row)


@pytest.mark.full
def test_every_configuration_runs_but_those_of_a_gpu(tmp_path):
    out = tmp_path / "rows.jsonl"
    found = qv.bench(CHECKPOINT, device="cpu", out=out, batch_size=(1, 2), **WORK)
    assert not found.failed
    names = [row.configuration for row in found.rows if row.batch_size == 2]
    assert names == [
        "transformers", "transformers-nf4", "default", "int4-flash", "cpu-offload", "compact", "streamed", "plan",
    ]  # fmt: skip
    for row in found.rows:
        check(row)
    assert qv.read_benchmark(out) == list(found.rows)


def test_rows_in_the_file_are_not_measured_again(file):
    before, told = file.read_bytes(), []
    began = time.monotonic()
    found = qv.bench(CHECKPOINT, rows=["default"], device="cpu", out=file, on_row=lambda *one: told.append(one), **WORK)
    assert time.monotonic() - began < 2
    assert file.read_bytes() == before
    assert told == [(found.rows[0], 1, 1)]


def test_a_row_that_fails_says_why_and_runs_again(tmp_path):
    out = tmp_path / "rows.jsonl"
    for _ in range(2):
        found = qv.bench(CHECKPOINT, rows=["default", "plan"], device="cpu", out=out, timeout=0.05, **WORK)
        assert [row.error for row in found.failed] == [
            "it did not end within 0.05 s; allow more with --timeout, or run it smaller"
        ] * 2
    assert len(out.read_text().splitlines()) == 4
    assert [row.configuration for row in qv.read_benchmark(out)] == ["default", "plan"]


def workers(parent):
    return [one for one in psutil.Process(parent).children() if "qwen_vram.benchmark.worker" in one.cmdline()]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.full) for one in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_killed_benchmark_leaves_whole_rows_and_no_process(tmp_path, file, number):
    out = tmp_path / "rows.jsonl"
    out.write_bytes(file.read_bytes() + b'{"model": "cut')
    code = "import qwen_vram as qv, sys\nqv.bench(sys.argv[1], rows=['default', 'plan'], device='cpu', out=sys.argv[2])"
    with subprocess.Popen([sys.executable, "-c", code, CHECKPOINT, out], stderr=subprocess.DEVNULL) as process:
        while not (found := workers(process.pid)):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(10)
        psutil.wait_procs(found, timeout=10)
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in found)
    assert out.read_bytes() == file.read_bytes()


def test_a_process_that_is_killed_is_a_row_that_failed():
    def kill():
        while not (found := workers(os.getpid())):
            time.sleep(0.02)
        found[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    found = qv.bench(CHECKPOINT, rows=["default"], device="cpu", **WORK)
    killer.join()
    assert found.failed[0].error.startswith(
        "its process ended with exit status -9 (killed, perhaps because the host's memory is full)"
    )


def test_the_command_prints_lines_of_json_and_nothing_else(file, tmp_path):
    ended = qwen_vram("bench", "--read", file, "--json", "--markdown", tmp_path / "rows.md")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [json.loads(line) for line in ended.stdout.splitlines()] == [
        row.to_dict() for row in qv.read_benchmark(file)
    ]
    assert "| `default` |" in (tmp_path / "rows.md").read_text()


def test_the_command_shows_failed_rows_and_says_so_by_its_status(tmp_path):
    call = ("bench", CHECKPOINT, "--rows", "plan", "--device", "cpu", "--timeout", "0.05", "--prompt-len", "8,9")
    ended = qwen_vram(*call, "--max-new-tokens", 2, "--json")
    assert ended.returncode == 1
    assert [json.loads(line)["prompt_len"] for line in ended.stdout.splitlines()] == [8, 9]
    ended = qwen_vram(*call)
    assert ended.returncode == 1
    assert "failed" in ended.stdout
    assert ended.stderr.count("plan: it did not end within 0.05 s") == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "name a MODEL to measure, or --read FILE"),
        ([CHECKPOINT, "--read", "rows.jsonl"], "name a MODEL to measure, or --read FILE"),
        ([CHECKPOINT, "--rows", "fast"], "unknown row of the benchmark 'fast'; choose from transformers,"),
        ([CHECKPOINT, "--prompt-len", "8,x"], "--prompt-len must be a positive whole number, or several as 512,4096"),
        ([CHECKPOINT, "--prompt-len", "0"], "prompt_len must be a positive whole number, got 0"),
        ([CHECKPOINT, "--prompt-len", "9000000"], "are past the model's max_position_embeddings"),
        ([CHECKPOINT, "--timeout", "0"], "timeout must be a positive number of seconds, got 0"),
        ([CHECKPOINT, "--device", "tpu"], "unknown device 'tpu'; choose from cuda, cpu"),
        ([CHECKPOINT, "--device", "cpu", "--vram", "8GiB"], "is a budget of a GPU, and the benchmark runs on the CPU"),
        ([CHECKPOINT, "--device", "cpu", "--out", "no/such/folder"], "cannot write the log 'no/such/folder'"),
        ([CHECKPOINT, "--plot", "rows.bmp"], "unknown format of --plot '.bmp'; choose from .svg, .png, .pdf"),
        ([CHECKPOINT, "--markdown", "no/such/rows.md"], "is in a folder that does not exist; make the folder first"),
        (["--read", "no-such-file"], "cannot read 'no-such-file'"),
        (["no-such-model"], "no-such-model"),
    ],
    ids=str,
)
def test_a_wrong_call_is_refused(options, text):
    ended = qwen_vram("bench", *options)
    assert ended.returncode == 2
    assert text in " ".join(ended.stderr.replace("│", " ").split())


def test_times_of_tokens_are_between_them():
    import torch

    ticks = [0.0, 0.01, 0.03, 0.04, 0.05]
    times, firsts = TokenTimes(on_first=lambda: firsts.append(1)), []
    assert (times.first_token_ms, times.step_ms()) == (None, (None, None))
    for pause in [0, *ticks]:  # the first is the prompt
        time.sleep(pause)
        times.put(torch.zeros(1))
    times.end()
    median, high = times.step_ms()
    assert firsts == [1]
    assert 34 <= median <= 45
    assert median < high <= 60
    assert times.first_token_ms < 34  # a pause of 0, on a busy machine
