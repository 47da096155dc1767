"""`qwen-vram serve --engine vllm` with a real vLLM: answers, streams, metrics, limits, and the end."""

from __future__ import annotations

import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import qwen_vram as qv
from tests.helpers.server import Server

pytestmark = pytest.mark.vllm
LENGTHS = {"prompt_len": 900, "max_new_tokens": 124}
QUESTIONS = ["What is 96 * 9?", "What is 12 + 30?", "What is 7 * 8?"]


def started(demo: Path, folder: Path, *options: object) -> Server:
    words = ("--engine", "vllm", "--vllm", folder, "--prompt-len", 900, "--max-new-tokens", 124, "--ram", "8GiB")
    return Server(demo, *words, *options)


def wait_ready(server: Server) -> Server:
    server.wait_for(lambda: server.get("/health")[0] == 200, seconds=400)
    return server


def processes_of(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def vllm(demo: Path, vllm_environment: Path) -> Iterator[Server]:
    pytest.importorskip("httpx2")
    with started(demo, vllm_environment, "--batch-size", 4, "--api-key", "secret") as server:
        yield wait_ready(server)


@pytest.fixture(scope="module")
def client(vllm: Server):
    from openai import OpenAI

    with OpenAI(base_url=f"{vllm.url}/v1", api_key="secret", max_retries=0, timeout=120) as made:
        yield made


def ask(client, question: str, **options: object) -> str:
    chat = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="checkpoint", messages=chat, temperature=0, max_tokens=60, **options)


def test_greedy_answers_are_those_of_this_library(demo, client):
    with qv.load(demo, profile="default", device="cpu", progress=False, **LENGTHS) as llm:
        for question in QUESTIONS:
            said = ask(client, question).choices[0].message.content
            assert said == llm.chat(question, temperature=0)


def test_a_stream_has_the_same_text_in_several_parts(client):
    whole = ask(client, QUESTIONS[0]).choices[0].message.content
    parts = [event.choices[0].delta.content or "" for event in ask(client, QUESTIONS[0], stream=True)]
    assert "".join(parts) == whole
    assert len(parts) > 5


def test_the_plan_is_what_vllm_reports(demo, vllm):
    planned = qv.plan(demo, vram={}, ram="8GiB", batch_size=4, **LENGTHS).to_vllm().memory
    text = vllm.get("/metrics", Authorization="Bearer secret")[1]
    for name, value in (("vllm_cache_tokens", planned.tokens), ("vllm_concurrency", planned.concurrency)):
        predicted, reported = (
            float(re.search(rf'qwen_vram_{name}{{kind="{kind}"}} (\S+)', text)[1]) for kind in ("predicted", "reported")
        )
        assert predicted == value
        assert abs(reported - predicted) <= 0.05 * predicted
    assert re.search(r"^vllm:kv_cache_usage_perc", text, re.M), "vLLM's own metrics are there too"
    assert 'qwen_vram_state{state="ready"} 1' in text
    assert f"vllm holds {planned.tokens:,} tokens of keys and values" in vllm.err
    assert "warning: vllm" not in vllm.err
    resident = float(re.search(r'process_resident_bytes{process="vllm"} (\S+)', text)[1])
    assert resident < 8 * 2**30


def test_keys_paths_and_errors(vllm):
    body = {"model": "checkpoint", "messages": [{"role": "user", "content": "hi"}]}
    assert vllm.post("/v1/chat/completions", body)[0] == 401
    key = {"Authorization": "Bearer secret"}
    assert vllm.get("/health")[0] == 200
    assert vllm.get("/v1/models", **key)[0] == 200
    assert vllm.get("/v1/../metrics", **key)[0] == 404
    assert vllm.get("/docs", **key)[0] == 404
    status, error = vllm.post("/v1/chat/completions", {**body, "model": "other"}, **key)
    assert (status, "other" in error["error"]["message"]) == (404, True)
    status, error = vllm.post("/v1/chat/completions", {**body, "max_tokens": 5000}, **key)
    assert status == 400
    assert "secret" not in vllm.err
    # vLLM's own port asks for another key.
    own = int(re.search(r"--port (\d+)", vllm.out)[1])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{own}/v1/models", timeout=10)


def test_several_requests_run_at_once(client):
    from concurrent.futures import ThreadPoolExecutor

    alone = {question: ask(client, question).choices[0].message.content for question in QUESTIONS}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: ask(client, question).choices[0].message.content, QUESTIONS * 4))
    assert together == [alone[question] for question in QUESTIONS * 4]


def test_a_client_that_leaves_ends_its_request_in_vllm(vllm, client):
    stream = client.completions.create(
        model="checkpoint", prompt="a", max_tokens=1000, stream=True, temperature=0, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    def running() -> float:
        text = vllm.get("/metrics", Authorization="Bearer secret")[1]
        return float(re.search(r"vllm:num_requests_running{[^}]*} (\S+)", text)[1])

    end = time.monotonic() + 5
    while running() and time.monotonic() < end:
        time.sleep(0.05)
    assert running() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_vllm_with_all_its_processes(demo, vllm_environment, number):
    with started(demo, vllm_environment) as server:
        if number == signal.SIGTERM:
            wait_ready(server)
        else:  # also while it starts
            server.wait_for(lambda: "vllm |" in server.err)
        below = processes_of(server)
        assert any("vllm" in " ".join(one.cmdline()) for one in below)
        server.terminate(number)
        server.process.join(60)
        assert server.process.exitcode == 0
        assert all_gone(below, 5)


def test_the_death_of_vllm_makes_health_503(demo, vllm_environment):
    with started(demo, vllm_environment) as server:
        wait_ready(server)
        below = processes_of(server)
        first = next(one for one in below if "serve" in one.cmdline())
        first.kill()
        server.wait_for(lambda: server.get("/health")[0] == 503, seconds=20)
        assert '"status": "failed"' in server.get("/health")[1]
        status, error = server.post("/v1/completions", {"model": "checkpoint", "prompt": "a"})
        assert (status, error["error"]["code"]) == (503, "server_failed")
        server.terminate()
        server.process.join(60)
        assert all_gone(below, 5)


def test_a_killed_server_leaves_no_process(demo, vllm_environment):
    with started(demo, vllm_environment) as server:
        wait_ready(server)
        below = processes_of(server)
        server.terminate(signal.SIGKILL)
        assert all_gone(below, 40)


def test_vllm_that_ends_at_its_start_is_an_error_with_its_log(demo, vllm_environment, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    (broken / "tokenizer.json").write_text("{")
    with started(broken, vllm_environment) as server:
        server.process.join(600)
        assert server.process.exitcode == 2
        assert "error: vLLM ended with status 1; the end of its log:" in server.err
        assert "tokenizer" in server.err.rpartition("the end of its log:")[2]


def test_two_workers_share_every_layer(demo, vllm_environment):
    with started(demo, vllm_environment, "--tensor-parallel", 2) as server:
        wait_ready(server)
        planned = qv.plan(demo, vram={}, ram="8GiB", **LENGTHS).to_vllm(tensor_parallel=2).memory
        assert f"vllm holds {planned.tokens:,} tokens of keys and values" in server.err
        status, answer = server.post(
            "/v1/chat/completions",
            {"model": "checkpoint", "messages": [{"role": "user", "content": QUESTIONS[1]}], "temperature": 0},
        )
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == "12 + 30 = 42"
