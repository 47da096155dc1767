"""`qwen-vram fleet`, run as a user runs it."""

import json

import yaml

from tests.helpers.command import qwen_vram

ASKED = ("fleet", "Qwen2.5-7B-Instruct", "--users", "20", "--tokens-per-second", "15")


def test_it_prints_a_table_and_writes_files(tmp_path):
    compose, kubernetes = tmp_path / "compose.yaml", tmp_path / "qwen.yaml"
    result = qwen_vram(*ASKED, "--gpus", "L4,A100-80GB", "--compose", compose, "--kubernetes", kubernetes)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Qwen/Qwen2.5-7B-Instruct for 20 users, vllm, ")
    assert "A100-80GB  bf16" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert f"wrote {compose}" in result.stderr
    assert "server-0" in yaml.safe_load(compose.read_text())["services"]
    assert [one["kind"] for one in yaml.safe_load_all(kubernetes.read_text())] == ["Deployment", "Service"]
    assert sorted(tmp_path.iterdir()) == [compose, kubernetes]


def test_json_is_one_object_and_nothing_else():
    lengths = ("--prompt-len", "100-900", "--max-new-tokens", "64", "--price", "L4=0.8", "--weights", "fp8,bf16")
    result = qwen_vram(*ASKED, "--gpus", "L4=6", *lengths, "--json")
    data = json.loads(result.stdout)
    assert result.returncode == 0
    assert data["best"]["gpu"] == "L4"
    assert data["best"]["gpus"] <= 6
    assert data["best"]["price_per_hour"] == 0.8 * data["best"]["gpus"]
    assert data["asked"]["prompt_len"]["most"] == 900


def test_refusals_have_status_2_and_leave_no_file(tmp_path):
    file = tmp_path / "compose.yaml"
    for wrong, text in (
        (("--gpus", "L5"), "unknown GPU 'L5'"),
        (("--gpus", "L4=x"), "--gpus names GPUs, or a number for each such as L4=4,A10=2; got 'L4=x'"),
        (("--gpus", "L4", "--prompt-len", "5-"), "--prompt-len must be a number of tokens, or a range"),
        (("--gpus", "L4", "--price", "L4"), "--price must be a GPU and its price for an hour, such as L4=0.8"),
        (("--gpus", "L4", "--kubernetes", str(tmp_path / "no" / "file")), "its folder is missing"),
        (("--gpus", "L4=1", "--first-token-seconds", "0.001"), "no fleet of these GPUs gives 95%"),
    ):
        result = qwen_vram(*ASKED, *wrong, "--compose", file)
        assert result.returncode == 2
        assert text in result.stderr
        assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_json_where_json_was_asked_for():
    result = qwen_vram(*ASKED, "--gpus", "L4=1", "--first-token-seconds", "0.001", "--json")
    data = json.loads(result.stdout)
    assert result.returncode == 2
    assert data["error"] == "WishNotMetError"
    assert data["nearest"][1] > 0.001
