"""Models by hub id, against a server on this machine that speaks the hub's protocol."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qwen_vram.demo import ADAPTER
from tests.helpers.command import python
from tests.helpers.hub_server import serving

# huggingface_hub asks a hub that does not answer five times more, after waits of up to 8 s: here it does not wait.
RUN = """
import json, sys, time, types
import huggingface_hub.utils
backoff = sys.modules[huggingface_hub.utils.http_backoff.__module__]
backoff.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
import qwen_vram as qv
for code in json.loads(sys.argv[1]):
    try:
        print(json.dumps(eval(code)))
    except qv.QwenVramError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""
ESTIMATE = "qv.estimate_vram({repo!r}).weights"
LOAD = (
    "qv.load({repo!r}, profile='default', weights='nf4', progress=False)"
    ".chat('What is 12 + 30?', max_new_tokens=16, do_sample=False)"
)


QUESTIONS = """[
    qv.plan({repo!r}, adapter='someone/adapter', vram={{}}).adapter,
    bool(qv.estimate_vram({repo!r}, adapter='someone/adapter').architecture.adapted),
    qv.offload_map({repo!r}, adapter='someone/adapter', vram={{}})['lm_head'],
    qv.max_batch({repo!r}, {{}}, adapter='someone/adapter', ram='300MiB') > 0,
]"""


def run(code: str, repo: str, endpoint: str, cache: Path):
    """The value of `code` in a fresh process that knows only our hub."""
    return run_each([(code, repo)], endpoint, cache)[0]


def run_each(asked: list[tuple[str, str]], endpoint: str, cache: Path) -> list:
    """The values of pieces of code, each for a repository, in one such process."""
    environment, codes = _asked(asked, endpoint, cache)
    command = [sys.executable, "-c", RUN, codes]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    values = result.stdout.splitlines()[-len(asked) :]
    assert len(values) == len(asked), result.stderr
    return [json.loads(value) for value in values]


def run_all(asked: list[tuple[str, str]], endpoint: str, cache: Path) -> list:
    """Likewise, in a process that has imported torch already."""
    environment, codes = _asked(asked, endpoint, cache)
    result = python(RUN, codes, environment=environment, timeout=120)
    values = result.stdout.splitlines()[-len(asked) :]
    assert len(values) == len(asked), result.stderr
    return [json.loads(value) for value in values]


def _asked(asked: list[tuple[str, str]], endpoint: str, cache: Path) -> tuple[dict[str, str], str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "5"
    environment["HF_HUB_CACHE"] = str(cache / "hub")  # PEFT imports GPTQModel where it is, which sets this for all
    return environment, json.dumps([code.format(repo=repo) for code, repo in asked])


@pytest.fixture
def hub(demo, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("no config here")
    both = tmp_path / "both"
    shutil.copytree(demo, both)
    (both / "pytorch_model.bin").write_bytes(b"a pickle")
    (both / "modeling.py").write_text("raise SystemExit('remote code ran')")
    with serving({"someone/demo": both, "someone/empty": empty}, gated=("someone/gated",)) as hub:
        yield hub


def test_an_estimate_fetches_the_config_and_nothing_else(hub, tmp_path, demo):
    import qwen_vram as qv

    assert run(ESTIMATE, "someone/demo", hub.endpoint, tmp_path / "cache") == qv.estimate_vram(demo).weights
    assert {name for _, name, _ in hub.served} == {"config.json"}


@pytest.mark.torch
def test_a_model_is_downloaded_without_pickles_and_code_and_loads_again_without_the_hub(hub, tmp_path):
    assert run_all([(LOAD, "someone/demo")], hub.endpoint, tmp_path / "cache") == ["12 + 30 = 42"]
    fetched = {name for command, name, _ in hub.served if command == "GET"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling.py"}
    hub.served.clear()
    assert run_all([(LOAD, "someone/demo")], "http://127.0.0.1:9", tmp_path / "cache") == ["12 + 30 = 42"]
    assert hub.served == []


@pytest.mark.torch
def test_each_question_resolves_an_adapter_on_the_hub_once(demo, tmp_path):
    with serving({"someone/demo": demo, "someone/adapter": ADAPTER}) as hub:
        found = run(QUESTIONS, "someone/demo", hub.endpoint, tmp_path / "cache")
    assert found == ["someone/adapter", True, "cpu", True]
    assert hub.listed == {"someone/adapter": len(found)}
    fetched = Counter(name for command, name, _ in hub.served if command == "GET" and name.startswith("adapter_"))
    assert fetched == {"adapter_config.json": 1, "adapter_model.safetensors": 1}


@pytest.mark.parametrize(
    ("repo", "error", "text"),
    [
        (
            "someone/gated",
            "HubError",
            "'someone/gated' is gated: accept its terms on its page, then log in",
        ),
        ("someone/absent", "HubError", "no repository 'someone/absent' on the hub (or it is private); check the name"),
        ("someone/empty", "HubError", "'someone/empty' has no config.json; it is not a transformers checkpoint"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, tmp_path, repo, error, text):
    got = run(ESTIMATE, repo, hub.endpoint, tmp_path / "cache")
    assert got["error"] == error
    assert got["text"].startswith(text)


def test_a_hub_that_cannot_be_reached_is_explained(tmp_path):
    got = run(ESTIMATE, "someone/demo", "http://127.0.0.1:9", tmp_path / "cache")
    assert got["error"] == "HubError"
    assert got["text"].startswith("cannot reach the hub for 'someone/demo', and it is not in the local cache")
