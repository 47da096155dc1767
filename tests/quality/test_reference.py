"""The stored logits: computed once, nothing half-written, and refusals before a model is loaded."""

import os
import subprocess
import sys

import pytest
import torch

import qwen_vram as qv
from qwen_vram.quality.reference import ReferenceLogits


def test_the_reference_runs_once(demo, tmp_path):
    asked = {"measure": "distance", "texts": 2, "text_tokens": 64, "device": "cpu", "logits": tmp_path}
    steps = []
    first = qv.check(demo, weights="bf16", **asked, on_progress=lambda step, done, of: steps.append((step, done, of)))
    assert first.reference_settings["weights"] == "bf16"
    assert steps == [(step, done, 2) for step in ("reference", "distance") for done in range(3)]
    again = qv.check(demo, weights="bf16", **asked)
    assert again.reference_settings is None
    assert again.distance == first.distance
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["0000.safetensors", "0001.safetensors", "reference.json"]


def test_a_stop_leaves_nothing(tmp_path):
    stored = ReferenceLogits(tmp_path, {"a": 1})

    def logits():
        yield torch.zeros(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored.write(logits(), lambda: None)
    assert not list(tmp_path.iterdir())
    assert not stored.is_stored


def test_what_a_killed_process_left_is_removed(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, own = (tmp_path / f".partial-{pid}-x" for pid in (ended.stdout.strip(), os.getpid()))
    dead.mkdir()
    own.mkdir()
    ReferenceLogits(tmp_path, {}).check_disk(1)
    assert [path.name for path in tmp_path.iterdir()] == [own.name]


def test_a_disk_that_is_too_full_is_refused(tmp_path):
    with pytest.raises(
        qv.CheckpointError, match=r"logits take up to .* are free; use fewer texts \(--texts\)"
    ) as caught:
        ReferenceLogits(tmp_path, {}).check_disk(10**18)
    assert caught.value.path == str(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    stored = ReferenceLogits(tmp_path, {})
    stored.write(iter([torch.zeros(2, 3)]), lambda: None)
    (stored.folder / "0000.safetensors").write_bytes(b"x")
    with pytest.raises(qv.CheckpointError, match="cannot be read .* delete their folder and repeat the call"):
        stored.read(0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"questions": 0}, "questions must be a whole number from 1 to"),
        ({"questions": 10_000}, "questions must be a whole number from 1 to"),
        ({"texts": 1}, "texts must be a whole number from 2 to 1,000, got 1"),
        ({"text_tokens": 5}, "text_tokens must be a whole number from 32 to 4,096, got 5"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"measure": "speed"}, "unknown measure 'speed'; choose from all, distance, questions"),
        ({"categories": ["poems"]}, "unknown category 'poems'"),
        ({"weight": "nf4"}, "unknown knob 'weight'"),
        ({"weights": "gptq-int8"}, "weights='gptq-int8'"),
        ({"profile": "speed", "device": "cpu"}, "captured|compiled|int4"),
    ],
    ids=str,
)
def test_a_wrong_call_is_refused_before_anything_is_written(demo, tmp_path, options, text):
    with pytest.raises(qv.QwenVramError, match=text):
        qv.check(demo, logits=tmp_path / "logits", **options)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_needs_a_reference(demo, tmp_path):
    with qv.load(demo, weights="nf4", device="cpu", progress=False) as llm:
        llm.save_quantized(tmp_path / "nf4", progress=False)
    with pytest.raises(qv.CheckpointError, match=r"stores nf4 weights, so it is no reference; name its 16-bit model"):
        qv.check(tmp_path / "nf4", device="cpu", logits=tmp_path / "logits")
    found = qv.check(
        tmp_path / "nf4",
        against=demo,
        measure="distance",
        texts=2,
        text_tokens=64,
        device="cpu",
        logits=tmp_path / "logits",
    )
    assert found.settings["weights"] == "nf4"
    assert found.distance.mean_kl.value > 0


def test_another_vocabulary_is_refused(demo, tmp_path):
    from tests.conftest import make_checkpoint

    other = make_checkpoint(tmp_path / "other", vocab_size=3200)
    with pytest.raises(qv.WorkloadError, match="has 3,072 logits and the reference 3,200") as caught:
        qv.check(demo, against=other, device="cpu", logits=tmp_path / "logits")
    assert caught.value.name == "against"
