"""Weights as people have them: files that are none, names, shapes and sets; and each refusal's advice, followed."""

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_vram as qv
from tests.helpers.command import python
from tests.helpers.odd_folders import (
    GONE,
    HEAD,
    POINTER,
    TABLE,
    Base,
    add,
    config,
    drop,
    floats,
    make_base,
    replaced,
    tensors,
)
from tests.runtime.loading.test_crossing import of_model, plain

STRAIGHT = Base()
ASKED = {"profile": "default", "prompt_len": 64, "max_new_tokens": 16, "progress": False}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(kind: Base) -> Path:
        if kind not in made:
            made[kind] = make_base(tmp_path_factory.mktemp("base"), kind)
        return made[kind]

    return base


@pytest.fixture
def new(bases, tmp_path):
    """A copy of a base."""

    def copy(kind: Base = STRAIGHT) -> Path:
        return Path(shutil.copytree(bases(kind), tmp_path / "model"))

    return copy


def logits(folder: Path, **knobs: object) -> torch.Tensor:
    with qv.load(folder, **ASKED, **knobs) as llm:
        return of_model(llm.model)


def shell(command: str, folder: Path) -> None:
    """Run a command of a message, with this Python for `python`."""
    command = re.sub(r"^python ", f"{sys.executable} ", command)
    subprocess.run(["bash", "-c", command], cwd=folder, check=True, capture_output=True, timeout=120)


def forked(command: str, folder: Path) -> None:
    """Run it in a process that has imported torch."""
    *words, code = shlex.split(command)
    assert words == ["python", "-c"]
    assert python(code, directory=folder).returncode == 0


# files that are not what their names say

CONTENTS = {
    "git lfs pull": POINTER.encode(),
    "is a web page": b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
    "an error page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "GGUF": b"GGUF\x03\0\0\0" + bytes(64),
    "torch.save": b"PK\x03\x04\x00\x00\x08\x08" + bytes(64),
    "a pickle": b"\x80\x02}q\x00." + b"x" * 64,
    "holds zeros": bytes(4096),
    "is empty": b"",
}
SAID = {"an error page": "is a web page", "a pickle": "torch.save"}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("shards", [False, True], ids=["single", "shard"])
def test_a_file_of_weights_that_is_none_is_named_for_what_it_is(new, content, shards):
    folder = new(Base(shards=shards))
    file = sorted(folder.glob("model*.safetensors"))[-1]
    file.write_bytes(CONTENTS[content])
    for call in (qv.estimate_vram, lambda model: qv.load(model, **ASKED)):
        with pytest.raises(qv.CheckpointError, match=SAID.get(content, content)) as caught:
            call(folder)
        assert caught.value.path == str(file)
        assert file.name in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["git lfs pull", "is a web page", "an error page"])
def test_other_files_that_are_none_are_named_too(new, file, content):
    folder = new()
    (folder / file).write_bytes(CONTENTS[content])
    with pytest.raises(qv.QwenVramError, match=SAID.get(content, content)) as caught:
        qv.load(folder, **ASKED)
    assert file in str(caught.value)


def test_an_index_that_is_a_pointer_is_named(new):
    folder = new(Base(shards=True))
    replaced("model.safetensors.index.json", POINTER)(folder)
    with pytest.raises(qv.CheckpointError, match=r"index\.json' is not a safetensors index .* Git LFS pointer"):
        qv.load(folder, **ASKED)


def test_an_index_without_metadata_loads_once_that_is_written(new):
    folder = new(Base(shards=True))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"]}))
    with pytest.raises(qv.CheckpointError, match='write "metadata": {} beside "weight_map"'):
        qv.load(folder, **ASKED)
    index.write_text(json.dumps({"metadata": {}, "weight_map": content["weight_map"]}))
    assert logits(folder).isfinite().all()


# what is not there

LEFT = {
    "model.safetensors.incomplete": "model.safetensors.incomplete",
    "model.safetensors.part": "model.safetensors.part",
    "model.safetensors.aria2": "model.safetensors.aria2",
    ".cache/huggingface/download/6SAyQ.0123abc.incomplete": ".cache/huggingface/download/6SAyQ.0123abc.incomplete",
}


@pytest.mark.parametrize("left", LEFT)
def test_a_download_that_stopped_is_named_by_what_is_left_of_it(new, left):
    folder = new()
    place = folder / left
    place.parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").rename(place)
    with pytest.raises(qv.CheckpointError, match=f"a download stopped there .*{re.escape(left)}.*it resumes"):
        qv.load(folder, **ASKED)
    place.rename(folder / "model.safetensors")  # what a resumed download does at its end
    assert logits(folder).isfinite().all()


def test_a_shard_whose_download_stopped_is_named(new):
    folder = new(Base(shards=True))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(folder / f"{shard.name}.incomplete")
    with pytest.raises(qv.CheckpointError, match=f"shard '{shard.name}' is missing .* its download stopped"):
        qv.load(folder, **ASKED)


def test_weights_by_another_name_load_once_they_are_renamed(new):
    folder = new()
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(
        qv.CheckpointError, match=r"model\.fp16\.safetensors is there; .* rename it to (\S+)$"
    ) as caught:
        qv.load(folder, **ASKED)
    (folder / "model.fp16.safetensors").rename(folder / str(caught.value).rpartition(" ")[2])
    assert logits(folder).isfinite().all()


def test_shards_without_an_index_are_named(new):
    folder = new(Base(shards=True))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(qv.CheckpointError, match=r"holds shards \(model-00001-of-.*without 'model\.safetensors\.index"):
        qv.load(folder, **ASKED)


def test_pickles_load_once_they_are_converted_as_the_message_says(new):
    folder = new()
    want = logits(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(qv.CheckpointError, match="holds only pickle files") as caught:
        qv.load(folder, **ASKED)
    shell(re.search(r'python -c ".*"', str(caught.value))[0], folder)
    made = folder.with_name(f"{folder.name}-safetensors")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, made)
    assert torch.equal(logits(made), want)


# names


@pytest.mark.parametrize("kind", [Base(), Base(shards=True)], ids=["single", "shards"])
@pytest.mark.parametrize(
    ("change", "prefix"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: f"module.{name}", "module."),
        (lambda name: f"module._orig_mod.{name}", "module._orig_mod."),
        (lambda name: f"base_model.model.{name}", "base_model.model."),
        (lambda name: f"llm.{name}", "llm."),
        (lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."), "_checkpoint_wrapped_module."),
        (lambda name: name.replace(".self_attn.", ".self_attn._fsdp_wrapped_module."), "_fsdp_wrapped_module."),
    ],
    ids=lambda value: value if isinstance(value, str) else "name",
)
def test_a_wrappers_prefix_is_named_and_the_command_takes_it_out(new, change, prefix, kind):
    folder = new(kind)
    want = logits(folder)
    for file in folder.glob("*.safetensors"):
        save_file({change(name): one for name, one in load_file(file).items()}, file, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = {change(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    with pytest.raises(qv.CheckpointError, match="prefix") as caught:
        qv.load(folder, **ASKED)
    assert repr(prefix) in str(caught.value)
    run = shell if prefix == "module." and not kind.shards else forked
    run(re.search(r'python -c ".*"', str(caught.value))[0], folder)
    assert torch.equal(logits(folder), want)


def test_an_unmerged_adapter_in_the_weights_is_named(new):
    folder = new()

    def unmerged(found):
        made = {
            f"base_model.model.{name}".replace("q_proj.weight", "q_proj.base_layer.weight"): one
            for name, one in found.items()
        }
        return made | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)}

    tensors(unmerged)(folder)
    with pytest.raises(qv.CheckpointError, match=r"an unmerged LoRA adapter .*model\.merge_and_unload\(\)"):
        qv.load(folder, **ASKED)


def test_one_name_twice_is_refused(new):
    folder = new()
    tensors(lambda found: found | {"norm.weight": found["model.norm.weight"]})(folder)
    with pytest.raises(qv.CheckpointError, match=r"hold model\.norm\.weight twice, with and without 'model\.'"):
        qv.load(folder, **ASKED)


# shapes, and keys of config.json that the message says to set

SETTINGS = {
    "vocab_size": (Base(), {"vocab_size": 4000}, "vocab_size to 3072"),
    "intermediate_size": (Base(), {"intermediate_size": 256}, "intermediate_size to 128"),
    "num_key_value_heads": (Base(), {"num_key_value_heads": 4}, "num_key_value_heads to 2"),
    "head_dim": (Base(kind="qwen3"), {"head_dim": GONE}, "head_dim to 96"),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_the_key_that_a_message_says_to_set_makes_the_weights_load(new, key):
    kind, change, advice = SETTINGS[key]
    folder = new(kind)
    config(**change)(folder)
    with pytest.raises(qv.CheckpointError, match=f"if they belong together, set {advice}$") as caught:
        qv.load(folder, **ASKED)
    named, _, value = str(caught.value).rpartition("set ")[2].partition(" to ")
    config(**{named: int(value)})(folder)
    assert torch.equal(logits(folder), plain(folder))


def test_fewer_layers_than_config_json_says_load_once_it_says_so(new):
    folder = new()
    drop("layers.2.")(folder)
    with pytest.raises(qv.CheckpointError, match="hold 2 decoder layers, and config.json says num_hidden_layers 3"):
        qv.load(folder, **ASKED)
    config(num_hidden_layers=2, layer_types=GONE)(folder)
    assert torch.equal(logits(folder), plain(folder))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_head_that_is_missing_is_the_table_once_config_json_says_so(new, kind):
    folder = new(Base(kind=kind, tied=True))
    want = plain(folder)
    for value in (False, GONE):
        config(tie_word_embeddings=value)(folder)
        for call in (qv.estimate_vram, lambda model: qv.load(model, **ASKED)):
            with pytest.raises(qv.CheckpointError, match="set tie_word_embeddings to true"):
                call(folder)
    config(tie_word_embeddings=True)(folder)
    assert torch.equal(logits(folder), want)


@pytest.mark.parametrize("part", ["mlp", "embed_tokens", "norm"])
def test_empty_tensors_are_named_as_those_of_zero_3(new, part):
    folder = new()
    tensors(lambda found: {name: one[:0] if part in name else one for name, one in found.items()})(folder)
    with pytest.raises(qv.CheckpointError, match=r"is empty in .* saved under DeepSpeed ZeRO-3, .*zero_to_fp32\.py"):
        qv.load(folder, **ASKED)


def test_a_head_of_another_dtype_beside_a_tied_table_is_refused(new):
    folder = new(Base(tied=True))
    tensors(lambda found: found | {HEAD: found[TABLE].float()})(folder)
    with pytest.raises(qv.CheckpointError, match="set tie_word_embeddings to false if the head is the model's own"):
        qv.load(folder, **ASKED)


@pytest.mark.parametrize("knobs", [{}, {"weights": "nf4"}, {"weights": "nf4", "lm_head": "nf4"}], ids=str)
def test_a_head_that_differs_from_a_tied_table_is_counted_as_it_is_loaded(new, knobs):
    folder = new(Base(tied=True))
    tensors(lambda found: found | {HEAD: found[TABLE].flip(0)})(folder)
    with qv.load(folder, **ASKED, **knobs) as llm:
        report = llm.report()
    assert report.measured["weights"] == report.estimate.weights
    assert report.estimate.weights == qv.estimate_vram(folder, prompt_len=64, max_new_tokens=16, **knobs).weights


# warnings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (floats(torch.float32), r"stored in float32 \(.*\) and run in bf16, .* save them once in bfloat16"),
        (add(score__weight=torch.ones(2, 2)), r"no place for 1 of the checkpoint's tensors, .*: score\.weight"),
        (config(num_hidden_layers=2, layer_types=GONE), r"no place for \d+ of .*: model\.layers\.2\."),
    ],
    ids=["float32", "another head", "fewer layers"],
)
def test_what_is_strange_and_loads_is_said_in_one_line(new, caplog, change, words):
    folder = new()
    change(folder)
    with caplog.at_level(logging.WARNING, logger="qwen_vram"):
        assert torch.equal(logits(folder), plain(folder))
    assert len([one for one in caplog.messages if re.search(words, one)]) == 1


def test_float32_files_that_run_in_float32_are_not_spoken_of(new, caplog):
    folder = new()
    floats(torch.float32)(folder)
    with caplog.at_level(logging.WARNING, logger="qwen_vram"):
        logits(folder, weights="fp32")
    assert caplog.messages == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_plan_puts_no_layers_on_the_disk_that_the_files_hold_otherwise(new, dtype):
    folder = new(Base(shape=(("hidden_size", 256), ("intermediate_size", 512))))
    floats(dtype)(folder)
    asked = {"streamed_layers": 2, "disk_layers": 1, "prompt_len": 64, "max_new_tokens": 16}
    calls = (
        lambda: qv.plan(folder, vram="8GiB", ram="8GiB", weights="bf16", **asked),
        lambda: qv.load(folder, progress=False, weights="bf16", **asked),
    )
    for call in calls:
        with pytest.raises(
            qv.NotSupportedError, match="what stays on the disk is used as it is stored: choose weights"
        ):
            call()
    same = "fp32" if dtype == torch.float32 else "fp16"
    assert qv.plan(folder, vram="8GiB", ram="8GiB", weights=same, **asked).profile.disk_layers == 1


# reading


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"weights": "nf4"},
        {"streamed_layers": 2},
        {"streamed_layers": 2, "disk_layers": 1},
        {"lm_head": "nf4", "weights": "nf4"},
    ],
    ids=str,
)
def test_each_header_is_read_once_in_a_load(new, monkeypatch, knobs):
    import qwen_vram.checkpoints.files.local as local

    folder = new(Base(tied=True, shards=True))
    read: Counter[str] = Counter()
    header = local.read_header
    monkeypatch.setattr(local, "read_header", lambda path: read.update([path.name]) or header(path))
    logits(folder, **knobs)
    assert set(read.values()) == {1}
    assert len(read) == len(list(folder.glob("*.safetensors")))


def test_each_header_of_a_base_is_read_once_in_a_merge(new, adapter, untied, tmp_path, monkeypatch):
    import qwen_vram.checkpoints.files.local as local

    read: Counter[str] = Counter()
    header = local.read_header
    monkeypatch.setattr(local, "read_header", lambda path: read.update([str(path)]) or header(path))
    base = shutil.copytree(untied, tmp_path / "base")  # made just now, so that nothing of it is held
    qv.merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize=None, progress=False)
    assert read[str(base / "model.safetensors")] == 1


def test_a_network_drive_is_read_through(new, monkeypatch):
    import qwen_vram.runtime.tensors.mapped_checkpoint as mapped

    folder = new()
    want = logits(folder)
    opened = []
    real = mapped.open_weights

    def noted(path, *, mapped):
        opened.append(mapped)
        return real(path, mapped=mapped)

    monkeypatch.setattr("qwen_vram.runtime.tensors.partial_checkpoint.open_weights", noted)
    assert torch.equal(logits(folder, disable_mmap=True), want)
    assert opened == [False]
    with pytest.raises(qv.NotSupportedError, match="disable_mmap=True does not go with streamed_layers=2") as caught:
        qv.load(folder, **ASKED, streamed_layers=2, disable_mmap=True)
    assert caught.value.knob == "disable_mmap"
    with qv.load(folder, **ASKED, weights="nf4") as llm:
        llm.save_quantized(folder.with_name("nf4"), progress=False)
    stored = logits(folder.with_name("nf4"), streamed_layers=2)
    assert torch.equal(logits(folder.with_name("nf4"), streamed_layers=2, disable_mmap=True), stored)
