"""Requests that run at once: places, several answers, the queue, clients that leave, and the end of the server."""

import json
import re
import time

import pytest

from tests.helpers.server import Server
from tests.serving.test_lifecycle import CODE, ended, health
from tests.serving.test_limits import CHAT, LONG, SHORT, Stream, load_of

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

LENGTHS = {"prompt_len": 64, "max_new_tokens": 1000}
ENDLESS = {**LONG, "max_tokens": 1000, "stream": True}
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def three(demo):
    options = ("--profile", "default", "--prompt-len", 64, "--max-new-tokens", 1000, "--max-waiting", 1)
    with Server(demo, *options, "--concurrency", 3) as started:
        yield started.ready()


def code_of(demo, tmp_path, grace):
    together = f"device='cpu', concurrency=2, prompt_len={LENGTHS['prompt_len']}, max_new_tokens=1000"
    (tmp_path / "load").touch()
    code = CODE.replace('device="cpu"', together).format(folder=str(tmp_path), checkpoint=str(demo), grace=grace)
    assert together in code
    return code


def metric(server, name):
    return int(re.search(rf"^qwen_vram_{name} (\d+)", server.get("/metrics")[1], re.M)[1])


def test_it_says_how_many_requests_run_at_once(three):
    assert "3 requests at once" in three.out
    assert "each of at most 1,064 tokens, prompt and answer together" in three.out
    assert metric(three, "requests_running_limit") == 3


def test_requests_run_at_once_and_the_next_one_waits_for_a_place(three):
    running = [Stream(three, ENDLESS).read_until("data: ") for _ in range(3)]
    assert load_of(three) == (3, 0)
    waiting = Stream(three, {**SHORT, "stream": True})
    three.wait_for(lambda: load_of(three) == (3, 1))
    assert metric(three, "requests_running") == 3
    assert metric(three, "requests_waiting") == 1
    for one in running:  # each makes tokens while the others do
        one.text = ""
        one.read_until("data: ")
    refused = Stream(three, SHORT).read_until("}}")
    assert refused.text.startswith("HTTP/1.1 429")
    assert re.search(r"\r\nretry-after: \d+\r\n", refused.text.lower())
    running[1].close()
    waiting.read_until("[DONE]").close()
    three.wait_for(lambda: load_of(three) == (2, 0), 10)
    for one in (running[0], running[2]):
        one.text = ""
        one.read_until("data: ").close()
    three.wait_for(lambda: load_of(three) == (0, 0), 10)
    refused.close()
    assert "Traceback" not in three.err


def test_answers_of_one_request_run_together_and_take_a_place_each(three):
    alone = [three.post(COMPLETIONS, {**LONG, "max_tokens": 30, "n": 1})[1]["choices"][0]["text"]]
    body = {**LONG, "max_tokens": 30, "n": 3}
    assert [one["text"] for one in three.post(COMPLETIONS, body)[1]["choices"]] == 3 * alone
    stream = Stream(three, {**body, "max_tokens": 1000, "stream": True}).read_until('"index": 2')
    assert '"finish_reason": "length"' not in stream.text  # the third began before the first was complete
    other = Stream(three, SHORT)
    three.wait_for(lambda: load_of(three) == (1, 1))
    stream.close()
    other.read_until("}}").close()
    assert other.text.startswith("HTTP/1.1 200")


def test_more_answers_than_places_are_answered_too(three):
    body = {"prompt": "The code of", "temperature": 1.0, "seed": 3, "max_tokens": 8, "n": 7}
    first, second = (three.post(COMPLETIONS, body)[1] for _ in range(2))
    texts = [one["text"] for one in first["choices"]]
    assert [one["index"] for one in first["choices"]] == list(range(7))
    assert texts == [one["text"] for one in second["choices"]]
    assert first["usage"]["completion_tokens"] > 7


def test_a_request_that_is_longer_than_its_pages_is_refused(three):
    status, answer = three.post(COMPLETIONS, {"prompt": "much " * 500, "max_tokens": 900})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert re.search(
        r"a request of 50\d \+ 900 tokens is longer than the planned 64 \+ 1,000", answer["error"]["message"]
    )
    assert load_of(three) == (0, 0)


def test_a_signal_lets_all_running_requests_finish(demo, tmp_path):
    with Server(code=code_of(demo, tmp_path, grace=60)) as server:
        server.ready()
        running = [Stream(server, {**ENDLESS, "max_tokens": 40}).read_until("data: ") for _ in range(2)]
        waiting = Stream(server, SHORT)
        server.wait_for(lambda: load_of(server) == (2, 1))
        server.terminate()
        waiting.read_until('"code": "server_stopping"').close()
        for one in running:
            one.read_until("[DONE]").close()
            assert '"finish_reason": "length"' in one.text
        assert ended(server) == 0
        assert "Traceback" not in server.err


def test_the_grace_time_ends_all_running_requests(demo, tmp_path):
    with Server(code=code_of(demo, tmp_path, grace=0.2)) as server:
        server.ready()
        running = [Stream(server, ENDLESS).read_until("data: ") for _ in range(2)]
        began = time.monotonic()
        server.terminate()
        for one in running:
            one.read_until('"code": "server_stopping"').close()
        assert ended(server) == 0
        assert time.monotonic() - began < 15


def test_a_model_that_is_closed_ends_all_running_requests(demo, tmp_path):
    with Server(code=code_of(demo, tmp_path, grace=5)) as server:
        server.ready()
        running = [Stream(server, ENDLESS).read_until("data: ") for _ in range(2)]
        (tmp_path / "close").touch()
        for one in running:
            one.read_until('"error": ').close()
            assert "[DONE]" not in one.text
        server.wait_for(lambda: server.post(CHAT, SHORT)[0] == 503)
        server.wait_for(lambda: health(server)[:2] == (503, "failed"))
        assert json.loads(server.get("/health")[1])["running"] == 0
