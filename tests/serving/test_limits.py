"""Keys, limits, other origins, a full queue, clients that leave, and comments that keep a connection alive."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from qwen_vram.serving.web.gates import is_loopback
from tests.helpers.server import Server

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

KEY = "sesame-open-4711"
AUTH = {"Authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"
SHORT = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 2}
# The bundled model repeats itself here, to the last token that it may make.
LONG = {"prompt": "\n\n\n\n", "temperature": 0, "max_tokens": 3000}


@pytest.fixture(scope="module")
def guarded(demo):
    options = (
        "--concurrency",
        1,
        "--max-waiting",
        2,
        "--max-body",
        "2KiB",
        "--heartbeat",
        0.02,
        "--cors",
        "https://a.example",
    )
    more = ("--served-model-name", "tiny", "--max-wait", 3, "--max-new-tokens", 200)
    with Server(demo, *options, *more, environment={"QWEN_VRAM_API_KEY": KEY}) as started:
        yield started.ready()


class Stream:
    """A request over a socket of its own, whose answer is read as it comes."""

    def __init__(self, server, body):
        path = "/v1/completions" if "prompt" in body else CHAT
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)
        self.text = ""

    def read_until(self, words):
        while words not in self.text:
            got = self.socket.recv(65536)
            assert got, self.text
            self.text += got.decode()
        return self

    def close(self):
        self.socket.close()


def load_of(server):
    state = json.loads(server.get("/health")[1])
    return state["running"], state["waiting"]


def test_every_path_but_health_needs_the_key(guarded):
    for path in ("/v1/models", "/metrics", "/v1/models/tiny", "/nowhere"):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
        ):
            status, text = guarded.get(path, **headers)
            assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key"), path
    assert guarded.post(CHAT, SHORT)[0] == 401
    assert guarded.get("/v1/models", Authorization=f"bearer  {KEY} ")[0] == 200
    assert guarded.get("/health")[0] == 200
    assert guarded.get("/nowhere", **AUTH)[0] == 404
    assert guarded.get(CHAT, **AUTH)[0] == 405
    assert guarded.post(CHAT, SHORT, **AUTH)[1]["model"] == "tiny"
    assert KEY not in guarded.out + guarded.err


def test_a_body_that_is_too_large_or_of_another_type_is_refused(guarded):
    status, answer = guarded.post(CHAT, {"messages": "x" * 3000}, **AUTH)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert "more than 2,048 bytes" in answer["error"]["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert guarded.post(CHAT, SHORT, **AUTH, Content_Type=kind)[0] == 415
    assert guarded.post(CHAT, SHORT, **AUTH, Content_Type="application/json; charset=utf-8")[0] == 200
    assert guarded.post(CHAT, SHORT, **AUTH, Content_Encoding="gzip")[0] == 415


def test_a_page_of_another_name_or_origin_is_refused(guarded):
    status, text = guarded.get("/health", Host="evil.example")
    assert (status, json.loads(text)["error"]["code"]) == (421, "wrong_host")
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert guarded.get("/health", Host=host)[0] == 200

    def allowed(origin, server):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        request = urllib.request.Request(f"{server.url}{CHAT}", headers=headers, method="OPTIONS")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.headers.get("Access-Control-Allow-Origin")
        except urllib.error.HTTPError as error:
            with error:
                return error.headers.get("Access-Control-Allow-Origin")

    assert allowed("https://a.example", guarded) == "https://a.example"
    assert allowed("https://b.example", guarded) is None


def test_cors_is_off_unless_it_is_asked_for(server):
    request = urllib.request.Request(f"{server.url}/v1/models", headers={"Origin": "https://a.example"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert not any(name.lower().startswith("access-control") for name in answer.headers)


def test_a_full_queue_a_long_wait_and_a_client_that_leaves(guarded):
    running = Stream(guarded, {**LONG, "stream": True}).read_until("data: ")
    waiting = [Stream(guarded, {**SHORT, "stream": True}) for _ in range(2)]
    for one in waiting:
        one.read_until(": keep-alive")  # the comments come before the first token
    assert load_of(guarded) == (1, 2)
    waiting[1].read_until(": keep-alive, 1 waiting before\n\n")
    assert ": keep-alive, 0 waiting before" in waiting[0].text
    refused = Stream(guarded, SHORT).read_until("}}")
    assert refused.text.startswith("HTTP/1.1 429")
    assert "\r\nretry-after: " in refused.text.lower()
    assert "2 requests wait already" in refused.text
    waiting[0].close()
    guarded.wait_for(lambda: load_of(guarded) == (1, 1), 5)
    waiting[1].read_until('"code": "waited_too_long"')
    guarded.wait_for(lambda: load_of(guarded) == (1, 0), 5)
    began = time.monotonic()
    running.close()
    guarded.wait_for(lambda: load_of(guarded) == (0, 0), 5)
    assert time.monotonic() - began < 4
    assert "[DONE]" not in running.text
    assert guarded.post(CHAT, SHORT, **AUTH)[0] == 200
    for one in (*waiting, refused):
        one.close()


def test_a_client_without_a_stream_frees_its_place_too(guarded):
    one = Stream(guarded, LONG)
    guarded.wait_for(lambda: load_of(guarded) == (1, 0), 10)
    one.close()
    guarded.wait_for(lambda: load_of(guarded) == (0, 0), 5)
    assert "POST /v1/completions 499" in guarded.err


def test_a_slow_answer_gets_comments(guarded):
    first = Stream(guarded, {**LONG, "max_tokens": 40, "stream": True}).read_until(": running")
    second = Stream(guarded, {**SHORT, "stream": True}).read_until("[DONE]")
    assert second.text.index(": keep-alive") < second.text.index(": running") < second.text.index("data: {")
    first.read_until("[DONE]").close()
    second.close()


def test_a_body_that_does_not_arrive_blocks_nobody(guarded):
    host, port = guarded.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection((host, int(port)), timeout=60) for _ in range(20)]
    for one in slow:
        one.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(guarded.post(CHAT, SHORT, **AUTH)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [200, 200]
    for one in slow:
        one.close()
    guarded.wait_for(lambda: load_of(guarded) == (0, 0), 5)


def test_an_address_is_known_as_this_machines_own():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))
