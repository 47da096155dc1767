"""`qwen-vram monitor`: what it prints."""

import json

import pytest

import qwen_vram as qv
from tests.helpers.command import qwen_vram

pytestmark = pytest.mark.torch  # the command's process is forked from one that has imported torch


def test_one_sample_as_json_is_one_object(tmp_path):
    ended = qwen_vram("monitor", "--once", "--json", "--log", tmp_path / "log")
    assert (ended.returncode, ended.stderr) == (0, "")
    data = json.loads(ended.stdout)
    assert list(data) == ["time", "gpus", "host", "plans", "driver"]
    assert [one.to_dict()["time"] for one in qv.read_log(tmp_path / "log")] == [data["time"]]


def test_one_sample_as_a_table_says_what_it_watches():
    text = qwen_vram("monitor", "--once").stdout
    assert text.startswith("host ")
    assert "this is the host's memory alone" in text


def test_a_log_is_summed_up_and_drawn(tmp_path):
    log = tmp_path / "log"
    for _ in range(2):
        qwen_vram("monitor", "--once", "--json", "--log", log)
    data = json.loads(qwen_vram("monitor", "--read", log, "--json", "--plot", tmp_path / "log.svg").stdout)
    assert (data["samples"], list(data["peak"])) == (2, ["host"])
    assert (tmp_path / "log.svg").exists()
    assert "host: at most " in qwen_vram("monitor", "--read", log).stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--every", "10"], "every must be a time of at least 50ms"),
        (["--json", "--csv"], "--json and --csv do not go together"),
        (["--plot", "x.svg"], "--plot needs --read LOG"),
        (["--read", "no-such-log"], "cannot read 'no-such-log'"),
    ],
    ids=str,
)
def test_a_wrong_call_is_refused(options, text):
    ended = qwen_vram("monitor", "--once", *options)
    assert ended.returncode == 2
    assert text in " ".join(ended.stderr.replace("│", " ").split())
