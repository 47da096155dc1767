"""Random adapters over random configurations, seeded: each is PEFT's merge in float32, rounded once, bit for bit."""

import copy
import random
import warnings
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from qwen_vram.lora import tensor_file as stored_module
from qwen_vram.lora.merge import merge_lora_then_quantize
from tests.helpers.lora_models import (
    SHAPE,
    assert_same,
    edit_tensors,
    load,
    make_base,
    peft_merged,
    peft_model,
    rounded_tensors,
    stored,
    untied_twin,
)
from tests.helpers.tiers import repeated

pytestmark = pytest.mark.filterwarnings("ignore:alpha_pattern of .* has several alphas")

SEEDS = range(240)
BASES = ["qwen2", "qwen3", "tied"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BIASED = ["q_proj", "k_proj", "v_proj"]
WHOLE = ["norm", "mlp", "1.self_attn", "input_layernorm", "o_proj", "embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    tied = make_base(root / "tied", tied=True, hidden_size=48, num_hidden_layers=1)
    return {
        "qwen2": make_base(root / "qwen2"),
        "qwen3": make_base(root / "qwen3", kind="qwen3", num_hidden_layers=3),
        "tied": tied,
        "twin": untied_twin(tied, root / "twin"),
    }


@pytest.fixture(scope="module")
def models(bases) -> dict[str, Any]:
    return {name: load(base) for name, base in bases.items()}


def patterns(rng: random.Random, values) -> dict[str, float]:
    keys = [*LINEAR, "layers.0.self_attn.q_proj", r".*mlp\..*", r"layers\.\d+\.self_attn\.[kv]_proj", "embed_tokens"]
    # PEFT sorts the patterns when it saves them, so any other order would be lost.
    return {key: values() for key in sorted(rng.sample(keys, rng.choice([0, 0, 1, 3])))}


def settings_of(rng: random.Random, kind: str) -> dict[str, Any]:
    """Settings that PEFT accepts, and the size of the vocabulary."""
    targets = rng.sample(LINEAR, rng.randint(1, len(LINEAR)))
    tables = rng.choice([[], [], [], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    dora = rng.random() < 0.3
    settings: dict[str, Any] = {
        "r": rng.randint(1, 12),
        "lora_alpha": rng.choice([1, 7, 16, 32, 0.5]),
        "use_rslora": rng.random() < 0.4,
        "use_dora": dora,
        "rank_pattern": patterns(rng, lambda: rng.randint(1, 9)),
        "alpha_pattern": patterns(rng, lambda: rng.choice([1, 3, 24, 2.5])),
        "bias": rng.choice(["none", "none", "all", "lora_only"]),
        "fan_in_fan_out": rng.random() < 0.1,
        "init_lora_weights": rng.choice([True, True, "gaussian"]),
    }
    if kind != "qwen3" and not dora and rng.random() < 0.25:
        settings |= {"lora_bias": True, "init_lora_weights": True}
        targets, tables = rng.sample(BIASED, rng.randint(1, 3)), []
    whole = rng.sample(WHOLE, rng.choice([0, 0, 1, 2]))
    if not [target for target in targets if target != "o_proj"]:
        targets.append("q_proj")
    if "1.self_attn" in whole and (kind == "tied" or "o_proj" in whole):
        whole.remove("1.self_attn")
    settings |= {"target_modules": targets + tables, "modules_to_save": whole or None}
    free = "embed_tokens" not in whole + tables and not (kind == "tied" and "lm_head" in whole)
    if free and rng.random() < 0.25:
        settings["trainable_token_indices"] = rng.sample(range(SHAPE["vocab_size"]), rng.randint(1, 9))
        if kind != "tied" and "lm_head" not in whole + tables and rng.random() < 0.5:
            settings["trainable_token_indices"] = {
                "embed_tokens": settings["trainable_token_indices"],
                "lm_head": rng.sample(range(SHAPE["vocab_size"]), 4),
            }
    return settings


def resized(rng: random.Random, settings: dict[str, Any]) -> int:
    """A new size of the vocabulary now and then; PEFT saves both tables unless only one of them is adapted."""
    adapted = {"embed_tokens", "lm_head"} & set(settings["target_modules"])
    return rng.choice([0, 0, 0, 163, 200]) if len(adapted) != 1 else 0


def traits(seed: int) -> set[str]:
    """Return what a seed draws: its base, the settings that are not off, and the modules adapted or trained whole."""
    rng = random.Random(seed)
    kind = rng.choice(BASES)
    settings = settings_of(rng, kind)
    lists = ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
    named = {f"{key} {one}" for key in lists for one in settings[key] or ()}
    rest = {f"{key} {settings[key]}" for key in ("bias", "init_lora_weights", "lora_alpha")}
    flags = {key for key, value in settings.items() if key not in lists and value and f"{key} {value}" not in rest}
    resize = {"resize"} if kind != "tied" and resized(rng, settings) else set()
    return {kind} | named | rest | flags | resize


def chosen() -> set[int]:
    """Few seeds that together draw every trait, and every pair of traits that twelve seeds or more draw."""
    drawn = {}
    for seed in SEEDS:
        found = sorted(traits(seed))
        drawn[seed] = {frozenset(some) for size in (1, 2) for some in combinations(found, size)}
    counts = Counter(some for found in drawn.values() for some in found)
    missing, seeds = {some for some, count in counts.items() if count >= 12 or len(some) == 1}, set()
    while missing:
        best = max(SEEDS, key=lambda seed: len(drawn[seed] & missing))
        seeds.add(best)
        missing -= drawn[best]
    return seeds


CHOSEN = chosen()


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed in CHOSEN else [pytest.mark.full]) for seed in SEEDS]
)
def test_a_random_adapter(bases, models, tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    kind = rng.choice(BASES)
    settings = settings_of(rng, kind)
    resize = resized(rng, settings) if kind != "tied" else 0
    monkeypatch.setattr(stored_module, "PIECE", rng.choice([2**21, 2048]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(models[kind])
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        size = rng.choice([0.01, 0.1])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=size)
        model.save_pretrained(tmp_path / "adapter")
        if kind == "tied" and "trainable_token_indices" not in settings:
            model = PeftModel.from_pretrained(copy.deepcopy(models["twin"]), tmp_path / "adapter")
    theirs = rounded_tensors(peft_merged(model))
    report = merge_lora_then_quantize(
        bases[kind],
        tmp_path / "adapter",
        tmp_path / "out",
        quantize=None,
        device="cpu",
        progress=False,
        max_shard_size=rng.choice([2**20, "4GB"]),
    )
    if report.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert_same(stored(tmp_path / "out"), theirs)
    assert report.vocab_size == (resize or SHAPE["vocab_size"])


@pytest.mark.parametrize("seed", repeated(4, of=30))
def test_random_sums_of_adapters(bases, models, tmp_path, monkeypatch, seed):
    rng = random.Random(1000 + seed)
    kind = rng.choice(["qwen2", "qwen3"])
    monkeypatch.setattr(stored_module, "PIECE", rng.choice([2**21, 2048]))
    folders = []
    for number in range(rng.randint(2, 4)):
        folder = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(100 * seed + number)
            settings = {
                "target_modules": rng.sample(LINEAR, rng.randint(1, 4)),
                "r": rng.randint(1, 8),
                "lora_alpha": rng.choice([1, 8, 20]),
                "use_rslora": rng.random() < 0.5,
                "alpha_pattern": patterns(rng, lambda: rng.choice([1, 3, 24])),
            }
            model = get_peft_model(copy.deepcopy(models[kind]), LoraConfig(**settings))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
            model.save_pretrained(folder)
        if rng.random() < 0.3:
            edit_tensors(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
        folders.append(folder)
    weights = [rng.choice([1.0, 1.0, 0.5, -0.25, 2.0]) for _ in folders]
    merge_lora_then_quantize(
        bases[kind],
        list(zip(folders, weights, strict=True)),
        tmp_path / "out",
        quantize=None,
        device="cpu",
        progress=False,
    )
    model = peft_model(bases[kind], *folders)
    for number, weight in enumerate(weights):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(str(number), weight)
    assert_same(stored(tmp_path / "out"), rounded_tensors(peft_merged(model)))
