"""A server's life: loading, a load that fails, an engine that ends, and signals."""

import json
import signal
import socket
import sys
import time

import pytest

import qwen_vram as qv
from qwen_vram.serving.web.server import check_installed
from qwen_vram.serving.web.settings import Settings
from tests.helpers.command import qwen_vram
from tests.helpers.server import Server
from tests.serving.test_limits import CHAT, LONG, SHORT, Stream, load_of

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

# A server whose load waits for a file, and whose model is closed, or whose engine gets an exception, by another file.
CODE = """
import ctypes, os, threading, time
import qwen_vram as qv
from qwen_vram.serving.web.server import serve
from qwen_vram.serving.web.settings import Settings

folder, checkpoint = {folder!r}, {checkpoint!r}

def waits(name):
    while not os.path.exists(os.path.join(folder, name)):
        time.sleep(0.01)

def load():
    waits("load")
    if os.path.exists(os.path.join(folder, "fail")):
        raise qv.CheckpointError("the shard is truncated", path="x")
    llm = qv.load(checkpoint, profile="default", device="cpu", progress=False)
    threading.Thread(target=lambda: (waits("close"), llm.close()), daemon=True).start()
    engine = threading.current_thread().ident
    def kill():
        waits("kill")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(engine), ctypes.py_object(SystemExit))
    threading.Thread(target=kill, daemon=True).start()
    return llm

try:
    serve(load, Settings(name="m", port=0, grace={grace}), listening=lambda url: print("listening on", url, flush=True))
except qv.QwenVramError as error:
    print("error:", error, flush=True)
    raise SystemExit(2)
"""


def slow_server(demo, tmp_path, grace=5):
    return Server(code=CODE.format(folder=str(tmp_path), checkpoint=str(demo), grace=grace))


def health(server):
    status, text = server.get("/health")
    return status, json.loads(text)["status"], json.loads(text)["reason"]


def ended(server, seconds=30):
    server.process.join(seconds)
    return server.process.exitcode


def test_it_says_that_it_loads_and_then_that_its_engine_ended(demo, tmp_path):
    with slow_server(demo, tmp_path) as server:
        assert health(server) == (503, "loading", "the model is being loaded")
        status, answer = server.post(CHAT, SHORT)
        assert (status, answer["error"]["code"]) == (503, "server_loading")
        (tmp_path / "load").touch()
        server.ready()
        running = Stream(server, {**LONG, "max_tokens": 400, "stream": True}).read_until("data: ")
        waiting = Stream(server, SHORT)
        server.wait_for(lambda: load_of(server) == (1, 1))
        (tmp_path / "kill").touch()
        running.read_until('"code": "server_failed"').close()
        waiting.read_until('"code": "server_failed"').close()
        server.wait_for(lambda: server.get("/health")[0] == 503)
        assert health(server) == (503, "failed", "the engine ended by SystemExit")
        assert 'state="failed"} 1' in server.get("/metrics")[1]
        assert server.post(CHAT, SHORT)[1]["error"]["message"].endswith("the engine ended by SystemExit")
        server.terminate()
        assert ended(server) == 0


def test_a_model_that_is_closed_makes_the_server_unhealthy(demo, tmp_path):
    (tmp_path / "load").touch()
    with slow_server(demo, tmp_path) as server:
        server.ready()
        (tmp_path / "close").touch()
        server.wait_for(lambda: server.post(CHAT, SHORT)[0] == 503)
        server.wait_for(lambda: health(server)[:2] == (503, "failed"))
        assert "closed" in health(server)[2]


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), pytest.param("::1", False, marks=[pytest.mark.full])])
def test_an_open_address_without_a_key_is_warned_of(demo, tmp_path, host, warned):
    code = CODE.replace("port=0,", f'port=0, host="{host}",').format(
        folder=str(tmp_path), checkpoint=str(demo), grace=1
    )
    with Server(code=code) as server:
        assert health(server)[1] == "loading"
        assert ("warning: other machines can use this server without a key" in server.err) is warned
        (tmp_path / "load").touch()
        server.ready()


def test_a_load_that_fails_ends_the_server_with_its_error(demo, tmp_path):
    (tmp_path / "fail").touch()
    with slow_server(demo, tmp_path) as server:
        assert health(server)[1] == "loading"
        (tmp_path / "load").touch()
        assert ended(server) == 2
        assert "error: the shard is truncated" in server.out
        assert "Traceback" not in server.out + server.err


def test_sigterm_while_it_loads_ends_it(demo, tmp_path):
    with slow_server(demo, tmp_path) as server:
        server.terminate()
        assert ended(server) == 0
        assert "stopped while the model was being loaded" in server.err
        assert "Traceback" not in server.err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=[pytest.mark.full])])
def test_a_signal_lets_the_running_request_finish(demo, tmp_path, number):
    (tmp_path / "load").touch()
    with slow_server(demo, tmp_path, grace=60) as server:
        server.ready()
        running = Stream(server, {**LONG, "max_tokens": 40, "stream": True}).read_until("data: ")
        waiting = Stream(server, SHORT)
        server.wait_for(lambda: load_of(server) == (1, 1))
        server.terminate(number)
        waiting.read_until('"code": "server_stopping"').close()
        assert waiting.text.startswith("HTTP/1.1 503")
        running.read_until("[DONE]").close()
        assert '"finish_reason": "length"' in running.text
        assert ended(server) == 0
        assert "Traceback" not in server.err


@pytest.mark.parametrize(("grace", "signals"), [(0.2, 1), pytest.param(60, 2, marks=[pytest.mark.full])])
def test_the_grace_time_ends_by_itself_and_by_a_second_signal(demo, tmp_path, grace, signals):
    (tmp_path / "load").touch()
    with slow_server(demo, tmp_path, grace=grace) as server:
        server.ready()
        running = Stream(server, {**LONG, "stream": True}).read_until("data: ")
        began = time.monotonic()
        server.terminate()
        server.wait_for(lambda: "stopping: running requests have" in server.err)
        if signals > 1:
            server.terminate()
        running.read_until('"code": "server_stopping"').close()
        assert "the server stopped before the answer was complete" in running.text
        assert ended(server) == 0
        assert time.monotonic() - began < 15


def test_a_wrong_call_has_status_2_and_one_line(demo):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = qwen_vram("serve", demo, "--port", port)
    assert refused.returncode == 2
    assert f"cannot listen on '127.0.0.1', port {port}" in refused.stderr
    refused = qwen_vram("serve", demo, "--heartbeat", 0)
    assert refused.returncode == 2
    assert "--heartbeat must be from 0.01 to 86,400.0, got 0.0" in " ".join(refused.stderr.split())
    refused = qwen_vram("serve", demo, "--ram", "1MiB")
    assert refused.returncode == 2
    assert "needs 0." in refused.stderr
    assert "listening" not in refused.stdout


def test_settings_are_checked():
    for fields, words in (
        ({"port": 70000}, "--port must be from 0 to 65,535, got 70000"),
        ({"max_body": 5}, "--max-body must be from 1,024"),
        ({"grace": float("nan")}, "--grace must be from 0.0 to 86,400.0, got nan"),
        ({"name": " "}, "--served-model-name must not be empty"),
        ({"api_key": "käse"}, "the API key must be ASCII characters, not empty"),
    ):
        with pytest.raises(qv.WorkloadError, match=words) as caught:
            Settings(**{"name": "m", **fields})
        assert "käse" not in str(caught.value) + str(caught.value.got)


def test_without_its_libraries_it_names_the_install_line(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(qv.BackendUnavailableError, match=r'needs uvicorn.*pip install "qwen-vram\[serve\]"') as caught:
        check_installed()
    assert caught.value.backend == "uvicorn"
