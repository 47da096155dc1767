"""The monitor's thread and its logs, which stay readable whatever ends the process."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import qwen_vram as qv
from qwen_vram.monitor import log as log_module
from qwen_vram.monitor.log import Log, LogError
from qwen_vram.monitor.monitor import parse_interval
from qwen_vram.monitor.sample import take
from qwen_vram.monitor.summary import summary_of


@pytest.mark.parametrize(
    ("every", "seconds"), [("10s", 10), ("500ms", 0.5), ("2min", 120), ("1.5h", 5400), (0.05, 0.05)]
)
def test_intervals(every, seconds):
    assert parse_interval(every) == seconds


@pytest.mark.parametrize("every", ["10", "0s", "-1s", "10 parsecs", "", 0, float("nan"), float("inf"), True, "49ms"])
def test_what_is_no_interval_is_refused(every):
    with pytest.raises(qv.UnitError, match="every must be a time of at least 50ms, such as '10s', '500ms' or '2min'"):
        parse_interval(every)


def test_a_monitor_takes_a_sample_at_once_at_each_interval_and_at_the_end(tmp_path):
    seen = []
    with qv.Monitor("60ms", log=tmp_path / "log", on_sample=seen.append) as monitor:
        assert len(monitor.samples) == 1
        time.sleep(0.25)
    assert 4 <= len(monitor.samples) <= 7
    assert seen == monitor.samples == qv.read_log(tmp_path / "log")
    peak = max(one.host.total - one.host.available for one in seen)
    assert monitor.peak["host"] == summary_of(seen).peak["host"] == peak
    monitor.stop()  # once more changes nothing
    with qv.Monitor("1h", log=tmp_path / "log", keep=1) as monitor:
        pass
    assert len(monitor.samples) == 1
    assert len(qv.read_log(tmp_path / "log")) == len(seen) + 2


def test_an_error_in_a_callback_ends_the_monitor_and_is_raised(tmp_path):
    def fail(sample):
        if len(monitor.samples) > 1:
            raise ValueError("no more")

    monitor = qv.Monitor("50ms", on_sample=fail)
    with pytest.raises(ValueError, match="no more"), monitor:
        monitor.wait(10)


def test_a_log_that_cannot_be_written_is_refused_before_the_first_sample(tmp_path):
    with pytest.raises(LogError, match="cannot write the log .*: No such file or directory; name a file in a folder"):
        qv.Monitor(log=tmp_path / "no" / "log").start()


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    write = os.write
    with Log(tmp_path / "log") as log:
        log.write(take())
        monkeypatch.setattr(log_module.os, "write", lambda file, line: write(file, line[:20]))
        with pytest.raises(LogError, match="no space left on device; free some space on its disk"):
            log.write(take())
        monkeypatch.undo()
        log.write(take())
    assert len(qv.read_log(tmp_path / "log")) == 2


def test_half_a_line_is_left_out_and_cut_off_by_the_next_log(tmp_path):
    path = tmp_path / "log"
    with Log(path) as log:
        log.write(take())
    line = path.read_bytes()
    path.write_bytes(line + b"x" * 100_000)
    assert len(qv.read_log(path)) == 1
    with Log(path) as log:
        assert path.read_bytes() == line
        log.write(take())
    assert len(qv.read_log(path)) == 2


@pytest.mark.parametrize("line", ["{}", "[1]", "null", "no json"])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    (tmp_path / "log").write_text(json.dumps(take().to_dict()) + f"\n{line}\n")
    with pytest.raises(LogError, match="line 2 of .* is not a sample of `qwen-vram monitor --log`"):
        qv.read_log(tmp_path / "log")
    with pytest.raises(LogError, match="cannot read '"):
        qv.read_log(tmp_path / "none")


def killed_logs(tmp_path, times):
    code = """
import sys
import qwen_vram as qv
qv.Monitor("50ms", log=sys.argv[1], on_sample=lambda one: print(flush=True)).start().wait()
"""
    rng = random.Random(5)
    for number in range(times):
        path = tmp_path / f"log{number}"
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        with process:
            process.stdout.readline()
            time.sleep(0.2 * rng.random())
            process.kill()
        yield qv.read_log(path), path.read_bytes()


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.full)])
def test_a_log_of_a_killed_process_is_readable_to_its_last_line(tmp_path, times):
    for samples, text in killed_logs(tmp_path, times):
        assert len(samples) >= 1
        assert text.count(b"\n") == len(samples)


def test_a_sample_takes_less_than_a_hundredth_of_a_core_at_the_default_interval():
    take()
    began = time.process_time()
    for _ in range(20):
        take()
    assert (time.process_time() - began) / 20 < 0.01 * parse_interval("10s")


@pytest.mark.parametrize("name", ["run.svg", "run.png"])
def test_a_log_is_drawn(tmp_path, name):
    pytest.importorskip("matplotlib")
    with qv.Monitor("50ms") as monitor:
        time.sleep(0.12)
    qv.plot_log(monitor.samples, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5_000
    with pytest.raises(qv.WorkloadError, match="there is no sample to draw"):
        qv.plot_log([], tmp_path / name)


def test_ctrl_c_ends_the_command_quietly(tmp_path):
    command = [
        sys.executable,
        "-m",
        "qwen_vram",
        "monitor",
        "--every",
        "100ms",
        "--log",
        str(tmp_path / "log"),
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert err == ""
    assert len(qv.read_log(tmp_path / "log")) == 1 + len(out.splitlines())
