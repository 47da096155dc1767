"""Names, addresses, folders and repositories as people write them, and what each of them leads to."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import qwen_vram as qv
from tests.checkpoints.test_hub import run, run_all
from tests.helpers.hub_server import serving
from tests.helpers.odd_folders import Base, make_base

ESTIMATE = "qv.estimate_vram({repo!r}, prompt_len=64, max_new_tokens=8).weights"
LOAD = "qv.load({repo!r}, profile='default', prompt_len=64, max_new_tokens=8, progress=False).plan.estimate.weights"
SNAPSHOT = "str(__import__('qwen_vram.checkpoints.hub.files', fromlist=['hub_snapshot']).hub_snapshot({repo!r}))"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), Base())


@pytest.fixture(scope="module")
def sharded_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("shards"), Base(shards=True))


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """A working folder with a checkpoint in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(base, tmp_path / "models" / "Qwen2___5-tiny")
    return tmp_path


def label(model) -> str:
    return qv.estimate_vram(model, prompt_len=64, max_new_tokens=8).model


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-7B-Instruct",
        " Qwen2.5-7B-Instruct ",
        "qwen/qwen2.5-7b-instruct/",
        "Qwen/Qwen2.5-7B-Instruct\n",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/tree/main",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json",
        "huggingface.co/Qwen/Qwen2.5-7B-Instruct?library=transformers",
        "hf.co/Qwen/Qwen2.5-7B-Instruct",
        "https://hf-mirror.com/Qwen/Qwen2.5-7B-Instruct/",
        "hf://Qwen/Qwen2.5-7B-Instruct",
        "https://modelscope.cn/models/Qwen/Qwen2.5-7B-Instruct/summary",
        "https://www.modelscope.cn/models/qwen/Qwen2.5-7B-Instruct/files",
        "Qwen/Qwen2___5-7B-Instruct",
        "Qwen2___5-7B-Instruct",
    ],
)
def test_names_of_one_model_lead_to_it(name):
    assert label(name) == "Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.parametrize(
    "name",
    [
        "models/Qwen2___5-tiny",
        "models/Qwen2___5-tiny/",
        " ./models/Qwen2___5-tiny ",
        "~/models/Qwen2___5-tiny",
        "models\\Qwen2___5-tiny",
        ".\\models\\Qwen2___5-tiny",
    ],
)
def test_paths_of_one_folder_lead_to_it(here, name):
    assert label(name) == "Qwen2___5-tiny"
    assert label(f"file://{here}/models/Qwen2___5-tiny") == "Qwen2___5-tiny"
    assert label(Path(name.strip().replace("\\", "/"))) == "Qwen2___5-tiny"
    qv.load(name, profile="default", prompt_len=64, max_new_tokens=8, progress=False).close()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("~/models/absent", "no checkpoint folder '~/models/absent'; point to the folder that holds config"),
        ("models/Qwen2.5-tiny/absent/x", "no checkpoint folder"),
        ("./models/Qwen2.5-tiny", r"ModelScope spells it 'models/Qwen2___5-tiny': pass that"),
        ("./models/qwen2___5-TINY", r"'models/Qwen2___5-tiny' is there: pass that"),
        (r"C:\models\Qwen2.5-7B", "a path of Windows, and in WSL the same folder is '/mnt/c/models/Qwen2.5-7B'"),
        ("D:/models/Qwen2.5-7B", "in WSL the same folder is '/mnt/d/models/Qwen2.5-7B'"),
        (
            "models/Qwen2___5-tiny/config.json",
            "a file of a checkpoint; pass the folder that holds it: 'models/Qwen2___5",
        ),
        ("models/Qwen2___5-tiny/model.safetensors", "a file of a checkpoint; pass the folder that holds it"),
        ("https://huggingface.co/Qwen", "is not the page of a model; pass its name"),
        ("https://huggingface.co/datasets/Qwen/x", "is not the page of a model"),
        (
            "https://huggingface.co/Qwen/Qwen3-8B/tree/0123abc",
            "names the revision '0123abc', .*hf download Qwen/Qwen3-8B --revision 0123abc --local-dir FOLDER",
        ),
    ],
)
def test_places_that_lead_nowhere_say_what_to_pass(here, name, text):
    for call in (qv.estimate_vram, qv.load):
        with pytest.raises(qv.ConfigError, match=text) as caught:
            call(name)
        assert caught.value.source


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct", "someone/some-model"])
def test_a_folder_that_hides_a_name_is_named(here, name, base):
    Path(name).mkdir(parents=True)
    for call in (qv.estimate_vram, qv.load, lambda model: qv.plan(model, vram="8GiB", ram="64GiB")):
        with pytest.raises(qv.ConfigError, match=f"this one is empty.*A folder of that name hides '{name}' of the hub"):
            call(name)
    if "Instruct" in name:
        Path(name).rename("away")
        assert qv.estimate_vram(name).weights
    else:
        shutil.copytree(base, name, dirs_exist_ok=True)
        assert label(name) == "some-model"


def test_a_file_that_hides_a_name_is_named(here):
    Path("some").mkdir()
    Path("some/model").write_text("x")
    with pytest.raises(qv.ConfigError, match="a file of that name is here, .*if the model of that name on the hub is"):
        qv.estimate_vram("some/model")


# folders that hold something else


def test_folders_without_config_json_are_named_for_what_they_hold(here, base, adapter):
    def refused(folder, text):
        for call in (qv.estimate_vram, qv.load):
            with pytest.raises(qv.ConfigError, match=text) as caught:
                call(folder)
        return str(caught.value)

    ggufs = here / "ggufs"
    ggufs.mkdir()
    (ggufs / "qwen2.5-7b-instruct-q4_k_m.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    refused(ggufs, r"'qwen2.5-7b-instruct-q4_k_m.gguf' is GGUF, the format of llama.cpp")
    refused(ggufs / "qwen2.5-7b-instruct-q4_k_m.gguf", "is GGUF, the format of llama.cpp")
    shutil.copytree(base, here / "run" / "checkpoint-100")
    shutil.copytree(base, here / "run" / "checkpoint-20")
    said = refused(here / "run", "the checkpoints are in its folders checkpoint-100, checkpoint-20: pass one of them")
    assert label(re.search("such as '(.*)'", said)[1]) == "checkpoint-20"
    shutil.copytree(base, here / "models--some--model" / "snapshots" / "0123")
    said = refused(here / "models--some--model", "the hub cache's folder of a repository; pass the snapshot in it")
    assert label(re.search("in it: '(.*)'", said)[1]) == "0123"
    shutil.copytree(base, here / "no-config")
    (here / "no-config" / "config.json").unlink()
    refused(here / "no-config", "which has weights; put the config.json of the same repository beside them")
    stopped = here / "stopped"
    stopped.mkdir()
    (stopped / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"")
    refused(stopped, r"a download stopped there \('model-00001-of-00002.safetensors.incomplete' is left of it\)")


@pytest.mark.parametrize("name", ["Qwen2.5-7B-Instruct-GGUF", "qwen3-8b-gguf", "Qwen3-8B.gguf"])
def test_names_of_gguf_files_propose_the_16_bit_name(name):
    with pytest.raises(qv.UnknownNameError, match="a '-GGUF' name are llama.cpp's, and not read") as caught:
        qv.estimate_vram(name)
    assert qv.estimate_vram(caught.value.allowed[0]).weights
    assert caught.value.allowed[0].lower() == name.lower()[:-5]


# the hub

STRAY = (
    "consolidated.safetensors", "model.fp32.safetensors", "checkpoint-500/model.safetensors", "onnx/model.safetensors",
    "original/consolidated.safetensors", "onnx/config.json",
)  # fmt: skip


@pytest.fixture
def repositories(base, sharded_base, tmp_path):
    stray = Path(shutil.copytree(base, tmp_path / "stray"))
    for name in STRAY:
        (stray / name).parent.mkdir(exist_ok=True)
        (stray / name).write_bytes(b"{}")
    both = Path(shutil.copytree(sharded_base, tmp_path / "both"))
    shutil.copy(base / "model.safetensors", both)
    named = Path(shutil.copytree(base, tmp_path / "named"))
    (named / "model.safetensors").rename(named / "tuned.safetensors")
    settings = json.loads((named / "config.json").read_text()) | {"transformers_weights": "tuned.safetensors"}
    (named / "config.json").write_text(json.dumps(settings))
    (named / "model.safetensors").write_bytes(b"of another run")
    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    (ggufs / "model-q4.gguf").write_bytes(b"GGUF")
    return {
        "some/stray": stray, "some/both": both, "some/shards": sharded_base, "some/named": named, "some/ggufs": ggufs,
    }  # fmt: skip


def test_one_set_of_weights_is_fetched_and_nothing_beside(repositories, tmp_path):
    wanted = {
        "some/stray": {"model.safetensors"},
        "some/both": {"model.safetensors"},
        "some/named": {"tuned.safetensors"},
        "some/shards": {path.name for path in repositories["some/shards"].glob("model-*.safetensors")},
    }
    with serving(repositories) as hub:
        found = run_all([(LOAD, repo) for repo in wanted], hub.endpoint, tmp_path / "cache")
    for repo, got in zip(wanted, found, strict=True):
        fetched = {name for command, name, _ in hub.served_of[repo] if command == "GET"}
        assert {name for name in fetched if name.endswith(".safetensors")} == wanted[repo]
        assert not any("/" in name for name in fetched)
        assert got == qv.estimate_vram(repositories[repo], prompt_len=64, max_new_tokens=8).weights


def test_a_cache_that_is_not_whole_names_the_file_that_it_lacks(repositories, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with serving(repositories) as hub:
        found = run_all([(SNAPSHOT, "some/shards"), (ESTIMATE, "some/stray")], hub.endpoint, cache)
    victim = sorted(Path(found[0]).glob("model-*.safetensors"))[1]
    os.remove(victim.resolve())
    loads = [(LOAD, "some/shards"), (LOAD, "some/stray"), (LOAD, "some/absent")]
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        found = run_all(loads, "http://127.0.0.1:9", cache)
        for got, name in zip(found, (victim.name, "model.safetensors", "it is"), strict=True):
            assert got["error"] == "HubError"
            assert name in got["text"]
            assert "not in the local cache" in got["text"]
            assert ("HF_HUB_OFFLINE is set" if offline == "1" else "at http://127.0.0.1:9 cannot") in got["text"]
            assert "then run: hf download some/" in got["text"]


def test_an_endpoint_that_was_set_too_late_is_named_with_the_one_that_was_asked(tmp_path):
    code = (
        "(__import__('huggingface_hub.constants'), __import__('os').environ.update("
        "HF_ENDPOINT='http://127.0.0.1:8'), " + ESTIMATE + ")[-1]"
    )
    got = run(code, "some/model", "http://127.0.0.1:9", tmp_path / "cache")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in got["text"]
    assert "HF_ENDPOINT is 'http://127.0.0.1:8' by now, which was set after huggingface_hub had been" in got["text"]


def test_a_repository_of_gguf_files_is_named(repositories, tmp_path):
    with serving(repositories) as hub:
        got = run(ESTIMATE, "some/ggufs", hub.endpoint, tmp_path / "cache")
    assert got["error"] == "HubError"
    assert "'some/ggufs' holds 'model-q4.gguf', which is GGUF, the format of llama.cpp" in got["text"]
