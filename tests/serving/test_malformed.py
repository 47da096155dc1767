"""Malformed requests: none gets status 500 or a traceback, opens a file, or leaves a secret in the log."""

import json
import random
import socket

import pytest

from tests.helpers.server import Server

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

KEY = "sesame-malformed-0815"
SECRET = "prompt-of-a-client-2342"
# A name of a file that no request may open. Nothing has this name.
CANARY = "canary-7391"
# A server that writes a line when Python opens a path with that name.
CODE = f"""
import os, sys
import qwen_vram as qv
from qwen_vram.serving.web.server import serve
from qwen_vram.serving.web.settings import Settings

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.chdir", "subprocess.Popen", "os.system", "socket.connect"):
        if {CANARY!r} in repr(arguments):
            sys.__stderr__.write("OPENED " + event + "\\n")

sys.addaudithook(hook)
serve(
    lambda: qv.load({{checkpoint!r}}, profile="default", device="cpu", progress=False),
    Settings(name="m", port=0, api_key={KEY!r}, max_body=200_000, body_seconds=0.5),
    hidden=[{{checkpoint!r}}],
    listening=lambda url: print("listening on", url, flush=True),
)
"""
FIELDS = (
    "model",
    "messages",
    "prompt",
    "n",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "response_format",
    "chat_template_kwargs",
    "logit_bias",
    "best_of",
    "echo",
    "suffix",
    "presence_penalty",
    "user",
)


@pytest.fixture(scope="module")
def target(demo):
    with Server(code=CODE.format(checkpoint=str(demo))) as started:
        yield started.ready()


def junk(draw):
    """A JSON value that few fields expect."""
    deep = []
    for _ in range(draw.choice((3, 70, 400))):
        deep = [deep]
    return draw.choice(
        [
            None,
            True,
            -1,
            0,
            2**70,
            -(2**63) - 1,
            1e308,
            0.1,
            "",
            "x" * draw.choice((1, 5000)),
            f"../../{CANARY}",
            SECRET,
            f"/{CANARY}/model.safetensors",
            "\x00",
            "<|im_end|>" * 9,
            "\u202e\U0001f600",
            [],
            {},
            [None],
            [[]],
            [1, "a", {}],
            {"type": CANARY},
            {"role": "user"},
            [{"role": "user", "content": [{"type": "image_url", "text": 3}]}],
            [{"role": CANARY, "content": "x"}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}],
            deep,
            {"__proto__": {}, "": 1},
            [""],
            ["stop"] * 99,
            {"chat_template": "{% include '" + CANARY + "' %}"},
            {"include_usage": "yes"},
            [{"type": "function", "function": {"name": "f", "parameters": deep}}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 3000}}]}],
        ]
    )


def valid(draw):
    chat = draw.random() < 0.6
    body = {"model": "m", "max_tokens": 1, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": SECRET}]} if chat else {"prompt": SECRET}
    return ("/v1/chat/completions" if chat else "/v1/completions"), body


def text_of(draw, body):
    """A body as bytes: JSON, or JSON with a fault."""
    good = json.dumps(body).encode()
    return draw.choice(
        [
            lambda: good,
            lambda: good,
            lambda: good[: draw.randrange(len(good))],
            lambda: bytes(draw.randrange(256) for _ in range(draw.randrange(200))),
            lambda: good.decode().encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + good,
            lambda: good.replace(b"m", b"\xff\xfe", 1),
            lambda: good[:-1] + b', "seed": NaN}',
            lambda: good[:-1] + b', "seed": ' + b"9" * 6000 + b"}",
            lambda: good[:-1] + b', "temperature": 1e999}',
            lambda: good[:-1] + b', "stop": "\\ud800"}',
            lambda: good[:-1] + b', "n": 1, "n": "2"}',
            lambda: b"[" * draw.choice((100, 100_000)),
            lambda: b'{"a":' * 20_000,
            lambda: b"null",
            lambda: b'"text"',
            lambda: b"",
            lambda: good + b"x" * 250_000,
            lambda: good + b"\n" + good,
        ]
    )()


def request_of(draw):
    """The bytes of one request: a fault in its fields, its JSON, its headers or its line."""
    path, body = valid(draw)
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        body[draw.choice(FIELDS)] = junk(draw)
    data = text_of(draw, body)
    headers = {
        "Host": "127.0.0.1",
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        "Connection": "close",
    }
    method, version = "POST", "HTTP/1.1"
    trick = draw.randrange(26)
    if trick == 0:
        headers["Content-Length"] = draw.choice(("-1", "abc", "9" * 40, "0x10", "+5", " ", str(len(data) + 7)))
    elif trick == 1:
        headers["Transfer-Encoding"] = draw.choice(("chunked", "gzip", "chunked, chunked", "identity"))
    elif trick == 2:
        del headers["Content-Length"]
        headers["Transfer-Encoding"] = "chunked"
        data = draw.choice(
            (b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data), b"zz\r\n", b"-5\r\nabc\r\n", b"ffffffffffff\r\nab")
        )
    elif trick == 3:
        headers["Authorization"] = draw.choice(("", "Bearer", f"Bearer {SECRET}", "\xff\xfe", "Bearer " + "x" * 9000))
    elif trick == 4:
        headers["Content-Type"] = draw.choice(("", "text/plain", "application/json; charset=utf-7", "\x00", "a" * 9000))
    elif trick == 5:
        headers["Host"] = draw.choice(("", "evil.example", "127.0.0.1:99999", "[", "a, b", "127.0.0.1\t"))
    elif trick == 6:
        method = draw.choice(
            ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "post", "X" * 300, "P OST", "HEAD")
        )
    elif trick == 7:
        path = draw.choice(
            (
                f"/v1/models/../{CANARY}",
                f"/v1/models/%2e%2e%2f{CANARY}",
                f"//{CANARY}",
                f"http://evil/{CANARY}",
                "*",
                "",
                f"/{CANARY}%00",
                "/" + "a" * 70_000,
                f"/v1/models/{CANARY}",
                "/%ff%fe",
                "/metrics?x=" + SECRET,
                "/health/../v1",
            )
        )
        method = draw.choice(("GET", "POST"))
    elif trick == 8:
        version = draw.choice(("HTTP/0.9", "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "", "ICY"))
    elif trick == 9:
        headers |= draw.choice(
            (
                {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "x"},
                {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings"},
                {"Expect": "100-continue"},
                {"Expect": "x"},
                {"X-Forwarded-For": CANARY, "X-Forwarded-Host": "evil"},
                {"Content-Encoding": "gzip"},
                {"Range": "bytes=0-"},
                {"X-A": "a" * 70_000},
                {"Bad Name": "x"},
                {"X-B": "a\r\nX-Injected: b"},
                {"Cookie": SECRET},
                {"Origin": "null"},
                {f"X-{number}": "y" for number in range(400)},
            )
        )
    elif trick == 10:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(1, 300))) + b"\r\n\r\n"
    lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


def answer_of(server, request):
    """Return the answer until the server closes the connection, or is silent for longer than its time limit."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        got = b""
        try:
            connection.sendall(request)
            while part := connection.recv(65536):
                got += part
        except (ConnectionResetError, BrokenPipeError, TimeoutError):
            pass
        return got.decode("utf-8", "replace")


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=[pytest.mark.full])])
def test_a_malformed_request_gets_an_answer_without_a_traceback(target, demo, count):
    draw = random.Random(count)
    found = {}
    for _ in range(count):
        request = request_of(draw)
        answer = answer_of(target, request)
        status = answer.split(" ")[1] if answer.startswith("HTTP/1.1 ") else answer[:20]
        found[status] = found.get(status, 0) + 1
        assert status.isdigit() or not status, (request[:600], answer[:600])
        assert not status.startswith("5"), (request[:600], answer[:600])
        assert "Traceback" not in answer, request[:600]
        assert 'File "' not in answer, request[:600]
        assert str(demo) not in answer, request[:600]
        assert KEY not in answer, request[:600]
    assert found["400"] > count / 3
    assert {"401", "404", "413", "415"} <= found.keys(), found
    assert sum(number for status, number in found.items() if not status) < count / 10, found  # closed without an answer
    target.wait_for(lambda: json.loads(target.get("/health")[1])["running"] == 0)
    assert target.get("/health")[0] == 200
    log = target.out + target.err
    for word in (KEY, SECRET, CANARY, "OPENED", "Traceback"):
        assert word not in log
    assert " error " not in log.replace("http error", "")
    assert target.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, Authorization=f"Bearer {KEY}")[0] == 200


def test_the_hook_of_this_test_sees_an_open():
    from tests.helpers.command import python

    hook = CODE[CODE.index("def hook") : CODE.index("serve(\n")]
    result = python(f"import sys\n{hook}\ntry:\n    open('/{CANARY}')\nexcept OSError:\n    pass")
    assert "OPENED open" in result.stderr
