"""Odd folders crossed with every way of loading: plain `transformers`' logits, or one refusal; never two answers."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qwen_vram as qv
from tests.helpers.odd_folders import FOLDERS, SHAPE, make

IDS = torch.tensor([[5, 100, 200, 300, 400, 500, 77, 9, 1500, 2000]])
ASKED = {"prompt_len": 64, "max_new_tokens": 16, "progress": False}
# bf16 keeps 8 bits of a number, so that neighbours of 4 to 8 are 2**-5 apart; a merge rounds once more.
TOLERANCE = {"merge": 2**-3}
LEAST = 2**-4


def of_model(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def loaded(**knobs: object) -> Callable[[Path, Path, Path], torch.Tensor]:
    def logits(folder: Path, adapter: Path, at: Path) -> torch.Tensor:
        with qv.load(folder, profile="default", **ASKED, **knobs) as llm:
            return of_model(llm.model)

    return logits


def merged(folder: Path, adapter: Path, at: Path) -> torch.Tensor:
    qv.merge_lora_then_quantize(folder, adapter, at, quantize=None, progress=False, device="cpu")
    return plain(at)


def saved(folder: Path, adapter: Path, at: Path) -> torch.Tensor:
    with qv.load(folder, profile="default", weights="nf4", **ASKED) as llm:
        llm.save_quantized(at, progress=False)
    return loaded()(at, adapter, at)


def plain(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return of_model(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16).eval())


WAYS: dict[str, Callable[[Path, Path, Path], torch.Tensor]] = {
    "bf16": loaded(weights="bf16"),
    "nf4": loaded(weights="nf4"),
    "int8": loaded(weights="int8"),
    "streamed": loaded(weights="bf16", streamed_layers=2),
    "streamed nf4": loaded(weights="nf4", streamed_layers=2),
    "disk layers": loaded(weights="bf16", streamed_layers=2, disk_layers=1),
    "host table": loaded(weights="bf16", embeddings="host"),
    "quantized head": loaded(weights="nf4", lm_head="nf4"),
    "read through": loaded(weights="nf4", disable_mmap=True),
    "merge": merged,
    "saved and loaded": saved,
}
# Compared with plain transformers itself; the others with the same quantization of the straight folder.
PLAIN = ("bf16", "streamed", "disk layers", "host table")


@pytest.fixture(scope="module", autouse=True)
def short_collections(demo, adapters):
    """Closing a model collects garbage; what libraries import for the first one need not be looked at each time."""
    adapters(SHAPE["hidden_size"])
    for weights in ("nf4", "bf16"):
        qv.load(demo, profile="default", weights=weights, streamed_layers=1, progress=False).close()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A LoRA of random numbers, by the base's hidden_size."""
    import peft
    from transformers import Qwen2Config, Qwen2ForCausalLM

    made: dict[int, Path] = {}

    def adapter(hidden_size: int) -> Path:
        if hidden_size not in made:
            folder = made[hidden_size] = tmp_path_factory.mktemp("adapter")
            shape = {**SHAPE, "hidden_size": hidden_size, "vocab_size": 64}
            torch.manual_seed(1)
            settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"], task_type="CAUSAL_LM")
            model = peft.get_peft_model(Qwen2ForCausalLM(Qwen2Config(**shape)), settings)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            model.save_pretrained(folder)
        return made[hidden_size]

    return adapter


def adapter_of(name: str, adapters: Callable[[int], Path]) -> Path:
    return adapters(int(dict(FOLDERS[name].base.shape).get("hidden_size", SHAPE["hidden_size"])))


# Several odd folders are of one model: by what is in the straight folder, and the way.
STRAIGHT: dict[tuple[str, str], torch.Tensor] = {}


def of_straight(folder: Path, adapter: Path, way: str, at: Path) -> torch.Tensor:
    """Results of a way of loading for a straight folder, computed once for all of the same content."""
    content = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    key = content.hexdigest(), way
    if key not in STRAIGHT:
        STRAIGHT[key] = WAYS[way](folder, adapter, at / f"straight {way}")
    return STRAIGHT[key]


def some_ways(name: str) -> list[str]:
    """A plain load, the library's own merge, one that streams, one of the rest, and those that refuse the folder."""
    number = LOADED.index(name)
    streams = ("streamed", "streamed nf4", "disk layers")
    rest = ("nf4", "int8", "quantized head", "read through", "saved and loaded", "host table")
    return ["bf16", "merge", streams[number % 3], rest[number // 3 % 6], *FOLDERS[name].refused_in]


LOADED = [name for name, odd in FOLDERS.items() if not odd.refusal]


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        *(pytest.param(name, some_ways(name), id=f"{name}, some ways") for name in LOADED),
        *(pytest.param(name, list(WAYS), id=f"{name}, all ways", marks=pytest.mark.full) for name in LOADED),
    ],
)
def test_every_way_of_loading_gives_the_model_that_transformers_loads(name, ways, adapters, tmp_path):
    folder, straight = make(name, tmp_path)
    adapter = adapter_of(name, adapters)
    want = plain(straight if FOLDERS[name].straight else folder)
    assert want.abs().max() > 8 * LEAST  # or nothing would be compared
    wrong = {}
    for way in ways:
        run = WAYS[way]
        if way in FOLDERS[name].refused_in:
            with pytest.raises(qv.NotSupportedError, match="what stays on the disk is used as it is stored"):
                run(folder, adapter, tmp_path / f"odd {way}")
            continue
        expected = want if way in PLAIN else of_straight(straight, adapter, way, tmp_path)
        far = (run(folder, adapter, tmp_path / f"odd {way}") - expected).abs().max().item()
        if not far <= TOLERANCE.get(way, LEAST):
            wrong[way] = far
    assert not wrong


@pytest.mark.parametrize("name", [name for name, odd in FOLDERS.items() if odd.refusal])
def test_every_way_of_loading_gives_the_same_refusal_before_anything_is_made(name, adapters, tmp_path, monkeypatch):
    folder, _ = make(name, tmp_path)
    adapter = adapter_of(name, adapters)

    def made(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was made before the refusal")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", made)
    ways = {
        **{way: lambda run=run, way=way: run(folder, adapter, tmp_path / way) for way, run in WAYS.items()},
        "estimate": lambda: qv.estimate_vram(folder, prompt_len=64, max_new_tokens=16),
        "plan": lambda: qv.plan(folder, vram="8GiB", ram="8GiB", prompt_len=64, max_new_tokens=16),
    }
    texts = set()
    for way, run in ways.items():
        with pytest.raises(qv.QwenVramError) as caught:
            run()
        texts.add(f"{type(caught.value).__name__}: {caught.value}")
        assert not (tmp_path / way).exists()
    assert len(texts) == 1
    assert FOLDERS[name].refusal in texts.pop()
