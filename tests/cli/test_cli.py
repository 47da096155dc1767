"""The command line, run as a user runs it."""

import json
import subprocess
import sys

import pytest

import qwen_vram as qv
from tests.helpers.command import qwen_vram


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A command in a process that a shell would start. `qwen_vram` has one that has imported torch."""
    command = [sys.executable, "-m", "qwen_vram", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=300)


def test_it_says_its_version():
    assert run("--version").stdout == f"qwen-vram {qv.__version__}\n"


def test_estimate_prints_a_table():
    result = run("estimate", "Qwen2.5-7B-Instruct")
    assert result.returncode == 0
    assert "15,231,233,024" in result.stdout


def test_estimate_takes_a_number_of_parameters():
    assert json.loads(qwen_vram("estimate", "--params", "7.62e9", "--json").stdout)["weights"] == 15_240_000_000


def test_estimate_prints_json_and_nothing_else():
    knobs = ["--set", "weights=nf4", "--set", "prefill_chunk_size=256", "--set", "compiled=false"]
    data = json.loads(qwen_vram("estimate", "Qwen2.5-7B", "--prompt-len", "8000", *knobs, "--json").stdout)
    assert data["profile"]["prefill_chunk_size"] == 256
    assert data["workload"]["prompt_len"] == 8000
    assert data["weights"] == 5_547_065_104


@pytest.mark.parametrize("pair", ["prompt_len=5", "model=x", "device=cpu", "batch_size=2"])
def test_what_is_no_knob_is_refused_by_name(pair):
    refused = qwen_vram("estimate", "Qwen2.5-7B", "--set", pair)
    assert refused.returncode == 2
    assert f"unknown knob '{pair.partition('=')[0]}'; choose from weights, lm_head" in " ".join(refused.stderr.split())


def test_a_digit_that_is_no_number_is_refused():
    refused = qwen_vram("estimate", "Qwen2.5-7B", "--set", "prefill_chunk_size=\u00b2")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_quantize_looks_at_its_output_before_it_loads(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    missing = str(tmp_path / "no-such-model")
    for out, options, message in (
        (tmp_path / "full", [], "exists"),
        (tmp_path / "full", ["--overwrite"], "has no config.json"),
        (tmp_path / "new", ["--max-shard-size", "4"], "max_shard_size"),
    ):
        refused = qwen_vram("quantize", missing, out, *options)
        assert refused.returncode == 2
        assert message in " ".join(refused.stderr.split())


def test_padding_is_counted():
    asked = ["plan", "Qwen2.5-7B-Instruct", "--vram", "80GiB", "--ram", "32GiB", "--batch-size", "2"]
    data = json.loads(qwen_vram(*asked, "--profile", "compact", "--padded", "--json").stdout)
    assert data["estimate"]["workload"]["padded"] is True
    asked = ["estimate", "Qwen2.5-7B", "--batch-size", "4", "--json"]
    even, padded = (json.loads(qwen_vram(*asked, *flag).stdout) for flag in ([], ["--padded"]))
    assert padded["peak_allocated"] > even["peak_allocated"]


def test_requests_at_once_are_counted_and_asked_for():
    asked = ["plan", "Qwen2.5-7B-Instruct", "--vram", "24GiB", "--ram", "32GiB", "--prompt-len", "1000"]
    data = json.loads(qwen_vram(*asked, "--concurrency", "16", "--json").stdout)
    most = data["limits"]["max_concurrency"]
    assert (data["concurrency"], data["profile"]["cache"]) == (16, "paged")
    assert most == qv.max_concurrency("Qwen2.5-7B-Instruct", "24GiB", ram="32GiB", prompt_len=1000)
    text = " ".join(qwen_vram(*asked, "--concurrency", "16").stdout.split())
    assert "16 requests at once predicted:" in text
    assert f"{data['limits']['max_context']:,} tokens a sequence with 16 requests at once, or batch" in text
    assert f", or {most:,} requests at once at 1,512 tokens" in text
    alone = json.loads(qwen_vram(*asked, "--json").stdout)
    assert alone["concurrency"] == 1
    assert alone["limits"]["max_concurrency"] == most
    assert alone["limits"]["min_vram"] < data["limits"]["min_vram"]
    without = qwen_vram(*asked, "--set", "kv_cache=int8")
    assert without.returncode == 0
    assert "at once" not in without.stdout
    estimate = ["estimate", "Qwen2.5-7B-Instruct", "--prompt-len", "1000", "--concurrency", "16"]
    counted = qv.estimate_vram("Qwen2.5-7B-Instruct", prompt_len=1000, concurrency=16)
    assert json.loads(qwen_vram(*estimate, "--json").stdout)["process_total"] == counted.process_total
    assert qwen_vram(*estimate).stdout.endswith("16 requests at once\n")


def test_wrong_numbers_of_requests_at_once_are_refused():
    for arguments, words in (
        (("plan", "Qwen2.5-7B", "--vram", "24GiB", "--concurrency", "0"), "must be None or a positive whole number"),
        (("estimate", "Qwen2.5-7B", "--concurrency", "2", "--batch-size", "3"), "are both given; each request is one"),
        (("plan", "Qwen2.5-7B", "--vram", "24GiB", "--concurrency", "2", "--set", "cache=static"), "leave cache out"),
        (("serve", "Qwen2.5-7B", "--vram", "24GiB", "--concurrency", "many"), "must be auto or a positive whole"),
        (("serve", "Qwen2.5-7B", "--engine", "vllm", "--concurrency", "4"), "--concurrency 4 is for --engine own"),
    ):
        refused = qwen_vram(*arguments)
        assert refused.returncode == 2, arguments
        assert words in " ".join(refused.stderr.split())


def test_plan_prints_its_steps():
    result = run("plan", "Qwen2.5-7B-Instruct", "--vram", "8GiB", "--ram", "32GiB", "--prompt-len", "32000")
    assert result.returncode == 0
    assert "weights='nf4'" in result.stdout


def test_plan_prints_json_and_nothing_else():
    data = json.loads(qwen_vram("plan", "Qwen2.5-7B-Instruct", "--vram", "20GiB", "--ram", "32GiB", "--json").stdout)
    assert data["profile"]["weights"] == "bf16"
    assert data["device_map"]["lm_head"] == 0


def test_plan_takes_several_gpus_and_a_reserve():
    two = ["plan", "Qwen2.5-14B", "--vram", "0=20GiB,1=16GiB", "--ram", "32GiB", "--reserve", "512MiB"]
    data = json.loads(qwen_vram(*two, "--json").stdout)
    text = "19.50 GiB of GPU 0 and 15.50 GiB of GPU 1 (512.0 MiB more kept free)"
    assert text in str(qv.Plan.from_dict(data))
    assert data["budget"]["devices"] == {"0": 39 * 2**29, "1": 31 * 2**29}
    assert sum(data["split"].values()) == 48
    assert {data["device_map"]["model.layers.0"], data["device_map"]["model.layers.47"]} == {0, 1}
    assert data["limits"]["max_context"] > 1_024


@pytest.mark.full
def test_plan_prints_several_gpus_and_a_reserve():
    two = ["plan", "Qwen2.5-14B", "--vram", "0=20GiB,1=16GiB", "--ram", "32GiB", "--reserve", "512MiB"]
    assert "19.50 GiB of GPU 0 and 15.50 GiB of GPU 1 (512.0 MiB more kept free)" in qwen_vram(*two).stdout


def test_a_refusal_over_several_gpus_has_every_devices_bytes():
    data = json.loads(qwen_vram("plan", "Qwen2.5-72B", "--vram", "0=8GiB,1=4GiB", "--ram", "64GiB", "--json").stdout)
    assert data["error"] == "DoesNotFitError"
    assert [data["devices"][device][1] for device in ("0", "1")] == [8 * 2**30, 4 * 2**30]
    assert data["devices"]["0"][0] > 8 * 2**30


def test_gpus_are_named_with_a_size_each():
    for wrong in ("0=8GiB,8GiB", "cuda:0=8GiB", "0=8GiB,0=9GiB", "=8GiB"):
        result = qwen_vram("plan", "Qwen2.5-7B", "--vram", wrong)
        assert result.returncode == 2
        assert f"names a size for each GPU once, such as 0=20GiB,1=20GiB; got '{wrong}'" in result.stderr


def test_a_refusal_is_one_line_and_status_2():
    result = qwen_vram("plan", "Qwen2.5-7B-Instruct", "--vram", "8")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: vram is a bare number: got '8'")
    assert result.stderr.count("\n") == 1


def test_a_refusal_is_json_where_json_was_asked_for():
    result = qwen_vram("plan", "Qwen2.5-72B", "--vram", "2GiB", "--ram", "32GiB", "--json")
    data = json.loads(result.stdout)
    assert result.returncode == 2
    assert data["error"] == "DoesNotFitError"
    assert data["needed_bytes"] > data["budget_bytes"] == 2 * 2**30


def test_a_knob_without_a_value_is_refused():
    refused = qwen_vram("estimate", "Qwen2.5-7B", "--set", "weights")
    assert "unknown --set 'weights'; choose from KNOB=VALUE" in refused.stderr


def test_chat_answers_one_message(demo):
    result = qwen_vram("chat", demo, "-m", "What is 12 + 30?")
    assert result.returncode == 0
    assert "42" in result.stdout


def test_chat_talks_until_the_input_ends(demo):
    result = qwen_vram("chat", demo, stdin="What is 12 + 30?\n/report\n")
    assert result.returncode == 0
    assert "42" in result.stdout
    assert "kv_cache" in result.stdout


@pytest.mark.parametrize("quantize", ["nf4", "int4"])
def test_merge_writes_a_checkpoint_that_chat_loads(untied, adapter, tmp_path, quantize):
    result = qwen_vram("merge", untied, adapter, tmp_path / "merged", "--quantize", quantize)
    assert result.returncode == 0, result.stderr
    assert "of the update kept" in result.stdout
    assert qwen_vram("chat", tmp_path / "merged", "-m", "hello", "--max-new-tokens", 4).returncode == 0


def test_merge_prints_json_and_nothing_else(untied, adapter, tmp_path):
    arguments = [untied, adapter, tmp_path / "merged", "--quantize", None, "--also", f"{adapter}=0.5"]
    data = json.loads(qwen_vram("merge", *arguments, "--json").stdout)
    assert data["quantize"] is None
    assert [weight for _, weight in data["adapters"]] == [1.0, 0.5]
    again = qwen_vram("merge", *arguments)
    assert again.returncode == 2
    assert "exists; choose another folder, or pass overwrite=True (--overwrite)" in again.stderr


@pytest.mark.slow
def test_demo_answers_and_measures(demo_output):
    assert "15,240,000,000" in demo_output
    assert demo_output.count("right") >= 8
    assert demo_output.count("weights ") >= 2
    assert "+0.00%" in demo_output
