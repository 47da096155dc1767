"""Checkpoints that the tests load: small, of random weights, made once; and the bundled one."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from qwen_vram.demo import CHECKPOINT
from tests.helpers.shared import made_once

# Nothing that `qwen-vram calibrate` stored on this machine may change a number in a test or in what a test starts.
_CACHE = tempfile.TemporaryDirectory(prefix="qwen_vram_tests_")
os.environ["QWEN_VRAM_CACHE"] = _CACHE.name

SHAPE = {
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def make_checkpoint(
    folder: Path, *, kind: str = "qwen2", tied: bool = False, max_shard_size: str = "5GB", **shape: int
) -> Path:
    """A checkpoint of random weights with the bundled tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    torch.manual_seed(0)
    config = Qwen2Config(**{**SHAPE, **shape}, tie_word_embeddings=tied)
    if kind == "qwen3":
        # Heads wider than hidden_size / num_attention_heads, as the small Qwen3 have them.
        config = Qwen3Config(**{**SHAPE, "head_dim": 96, **shape}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in CHECKPOINT.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "untied", lambda folder: make_checkpoint(folder))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "tied", lambda folder: make_checkpoint(folder, tied=True))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "qwen3", lambda folder: make_checkpoint(folder, kind="qwen3", tied=True))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "sharded", lambda folder: make_checkpoint(folder, max_shard_size="2MB"))


@pytest.fixture(scope="session")
def demo() -> Path:
    return CHECKPOINT


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of `qwen-vram demo` in a process that a shell would start."""

    def run(folder: Path) -> None:
        command = [sys.executable, "-m", "qwen_vram", "demo"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        folder.mkdir()
        (folder / "out").write_text(result.stdout, encoding="utf-8")

    return (made_once(tmp_path_factory, "demo_output", run) / "out").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def gptqmodel() -> None:
    """Skips where GPTQModel is not installed."""
    missing = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: pip install 'qwen-vram[gptq]'")


@pytest.fixture(scope="session")
def calibration() -> list[str]:
    """Questions with answers of the kind that the bundled checkpoint was trained on, in its chat format."""
    from transformers import AutoTokenizer

    from qwen_vram.demo.tasks import CATEGORIES, examples

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    found = [one for name in CATEGORIES for one in examples(name, "train", seed=1, count=6) if len(one.prompt) < 600]
    chats = [[{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}] for one in found]
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    # GPTQModel runs every layer five times on each sample: six long ones take less time than fifty.
    return ["".join(texts[number::6]) for number in range(6)]


@pytest.fixture(scope="session")
def gptq_demo(gptqmodel: None, calibration: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint in 4 bits by GPTQ, made by the command line, with nothing beside it in its folder."""
    return gptq_made(calibration, tmp_path_factory) / "quantized" / "model"


@pytest.fixture(scope="session")
def gptq_said(gptqmodel: None, calibration: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the command that made it said, in the files `out` and `err`."""
    return gptq_made(calibration, tmp_path_factory)


def gptq_made(calibration: list[str], factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.command import qwen_vram

    def quantize(folder: Path) -> None:
        (folder / "quantized").mkdir(parents=True)
        texts, out = folder / "texts.jsonl", folder / "quantized" / "model"
        texts.write_text("\n".join(map(json.dumps, calibration)), encoding="utf-8")
        options = ("--weights", "gptq-int4", "--calibration", texts, "--device", "cpu", "--json")
        result = qwen_vram("quantize", CHECKPOINT, out, *options)
        assert result.returncode == 0, result.stderr
        (folder / "out").write_text(result.stdout, encoding="utf-8")
        (folder / "err").write_text(result.stderr, encoding="utf-8")

    return made_once(factory, "gptq_demo", quantize)


@pytest.fixture(scope="session")
def awq_demo(gptq_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same codes as AutoAWQ stores them."""
    from tests.helpers.gptq_files import as_awq

    return made_once(tmp_path_factory, "awq_demo", lambda out: as_awq(gptq_demo, out))


@pytest.fixture(scope="session")
def adapter(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of random numbers for the untied checkpoint, as PEFT saves it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    def make(folder: Path) -> None:
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(untied), peft.LoraConfig(r=8, target_modules=targets, lora_alpha=16)
        )
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)

    return made_once(tmp_path_factory, "adapter", make)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Keep what is imported by now out of later collections: each `close()` collects garbage, 0.2 s with torch.

    Each load asks for the number of frozen objects twice. Python counts them one by one, 0.03 s: count them once.
    """
    gc.collect()
    gc.freeze()
    frozen = gc.get_freeze_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", lambda: frozen)
        yield


_modules_frozen = 0


@pytest.fixture(autouse=True)
def quick_collections_after_imports() -> None:
    """The same for what the tests before have imported: PEFT imports GPTQModel for its first adapter."""
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 100:
        _modules_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


# Folders whose tests need no torch, unless they are marked `torch` or ask for a checkpoint that torch makes.
WITHOUT_TORCH = {
    Path(__file__).parent / name for name in ("spec", "arithmetic", "checkpoints", "planning", "monitor", "diagnosis")
}
MADE_BY_TORCH = {"untied", "tied", "qwen3", "sharded", "wide", "adapter", "calibration", "gptq_demo", "awq_demo"}


@pytest.hookimpl(tryfirst=True)  # before pytest's own deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; mark what needs no torch."""
    for item in items:
        made = MADE_BY_TORCH & set(getattr(item, "fixturenames", ()))
        if WITHOUT_TORCH & set(item.path.parents) and not made and "torch" not in item.keywords:
            item.add_marker(pytest.mark.no_torch)
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _has_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 25 MB in bf16, so that copies take longer than launches."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 8}
    return made_once(tmp_path_factory, "wide", lambda folder: make_checkpoint(folder, **shape))
