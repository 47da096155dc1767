"""Every variant of LoRA, merged: PEFT's own merge in float32, rounded once, is the oracle, bit for bit."""

import json
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import MontecloraConfig, VeloraConfig
from peft.tuners.lora import LoraLayer

from qwen_vram.lora import tensor_file as stored_module
from qwen_vram.lora.merge import merge_lora_then_quantize
from tests.helpers.lora_models import (
    assert_same,
    edit_config,
    edit_tensors,
    load,
    logits,
    make_adapter,
    make_base,
    peft_merged,
    peft_model,
    rounded_tensors,
    stored,
    untied_twin,
)
from tests.helpers.tiers import thinned

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "untied": make_base(root / "untied"),
        "tied": make_base(root / "tied", tied=True),
        "qwen3": make_base(root / "qwen3", kind="qwen3"),
        "fp16": make_base(root / "fp16", dtype=torch.float16),
        "fp32": make_base(root / "fp32", dtype=torch.float32),
    }


def merge(base, adapter, out, **options):
    return merge_lora_then_quantize(
        base, adapter, out, **{"quantize": None, "device": "cpu", "progress": False, **options}
    )


VARIANTS = {
    "VeLoRA": {"target_modules": LINEAR, "velora_config": VeloraConfig(num_groups=5, init_type="random")},
    "MonteCLoRA": {
        "target_modules": LINEAR,
        "r": 4,
        "monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2),
    },
    "all linear": {"target_modules": LINEAR, "r": 8},
    "regex": {"target_modules": r".*layers\.1\..*(q|gate)_proj"},
    "rsLoRA": {"target_modules": LINEAR, "r": 6, "lora_alpha": 11, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 9, r".*mlp\..*": 3},
        "alpha_pattern": {"q_proj": 5, "layers.1.self_attn.q_proj": 1, "up_proj": 13, "^model.*o_proj": 3},
    },
    "patterns and rsLoRA": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"v_proj": 31, "o_proj": 3},
    },
    "DoRA": {"target_modules": LINEAR, "use_dora": True, "r": 5},
    "DoRA and rsLoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "DoRA on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "DoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True, "lora_alpha": 32},
    "fan_in_fan_out": {"target_modules": [*LINEAR, "embed_tokens"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
    "embedding alone": {"target_modules": ["embed_tokens"], "save": False},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "embedding and head": {"target_modules": ["lm_head", "embed_tokens", "o_proj"], "save": False},
    "modules_to_save: head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "modules_to_save: both tables": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "modules_to_save: norms": {"target_modules": LINEAR, "modules_to_save": ["norm"]},
    "modules_to_save: whole mlp": {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["mlp"]},
    "modules_to_save: attention with biases": {"target_modules": ["up_proj"], "modules_to_save": ["0.self_attn"]},
    "modules_to_save beats target": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 159, 0]},
    "trainable tokens on both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [5, 1, 9]},
    },
    "all biases": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "trained bias and lora_bias": {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "mica": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"},
    "resized": {"target_modules": ["q_proj"], "resize": 171},
    "resized to fewer": {"target_modules": ["q_proj"], "resize": 150},
    "resized, both tables adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "resize": 171},
    "resized, modules_to_save": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "resize": 171,
    },
    "resized, embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "resize": 171},
    "resized, trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [160, 170], "resize": 171},
    "rank one": {"target_modules": LINEAR, "r": 1},
    "wide rank": {"target_modules": LINEAR, "r": 64, "lora_alpha": 128},
    "large": {"target_modules": LINEAR, "size": 3.0},
    "tiny": {"target_modules": LINEAR, "size": 1e-5},
}


WHOLE, IN_PIECES = (stored_module.PIECE,), (2048,)
VARIANT_ROWS = [
    pytest.param(settings, pieces, id=f"{name}, {text}", marks=[pytest.mark.full] if full else [])
    for number, (name, settings) in enumerate(VARIANTS.items())
    for pieces, text, full in (
        (IN_PIECES if number % 2 else WHOLE, "in pieces" if number % 2 else "whole", False),
        (WHOLE + IN_PIECES, "both", True),
    )
]


@pytest.mark.parametrize(("settings", "pieces"), VARIANT_ROWS)
def test_a_variant_is_peft_rounded_once(bases, tmp_path, settings, pieces, monkeypatch):
    base = bases["untied"]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    theirs = rounded_tensors(peft_merged(peft_model(base, adapter, resize=settings.get("resize", 0))))
    for piece in pieces:
        monkeypatch.setattr(stored_module, "PIECE", piece)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(keep less than 90% of their update|has several alphas)")
            report = merge(base, adapter, tmp_path / "out", overwrite=True)
        assert_same(stored(tmp_path / "out"), theirs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == report.vocab_size == settings.get("resize", 160)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    *thinned(
        1,
        variant=["all linear", "DoRA", "modules_to_save: norms", "embedding and head"],
        case=[("qwen3", torch.bfloat16), ("fp16", torch.float16), ("fp32", None)],
    )
)
def test_other_bases_and_dtypes(bases, tmp_path, variant, case):
    name, dtype = case
    adapter = make_adapter(bases[name], tmp_path / "adapter", **VARIANTS[variant])
    merge(bases[name], adapter, tmp_path / "out")
    theirs = peft_merged(peft_model(bases[name], adapter))
    assert_same(stored(tmp_path / "out"), rounded_tensors(theirs, dtype or torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_16_bit_is_widened_first(bases, tmp_path, dtype):
    adapter = make_adapter(bases["untied"], tmp_path / "adapter", target_modules=LINEAR, use_dora=True)
    edit_tensors(adapter, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    merge(bases["untied"], adapter, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), rounded_tensors(peft_merged(peft_model(bases["untied"], adapter))))


def test_dora_of_old_pefts_spells_its_vector_with_weight(bases, tmp_path):
    adapter = make_adapter(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    merge(bases["untied"], adapter, tmp_path / "one")

    def respell(tensors):
        for key in [key for key in tensors if key.endswith("magnitude_vector")]:
            tensors[f"{key}.weight"] = tensors.pop(key)

    edit_tensors(adapter, respell)
    merge(bases["untied"], adapter, tmp_path / "other")
    assert_same(stored(tmp_path / "one"), stored(tmp_path / "other"))


def test_fan_in_fan_out_means_nothing_for_linear_layers_as_in_peft(bases, tmp_path):
    adapter = make_adapter(bases["untied"], tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    edit_config(adapter, fan_in_fan_out=True)
    merge(bases["untied"], adapter, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), rounded_tensors(peft_merged(peft_model(bases["untied"], adapter))))


# several adapters


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -1.5, 2.0)], ids=["plain", "weighted"])
def test_several_adapters_are_summed_in_their_order(bases, tmp_path, weights):
    base = bases["untied"]
    adapters = [
        make_adapter(base, tmp_path / "a", seed=1, target_modules=LINEAR, r=8),
        make_adapter(base, tmp_path / "b", seed=2, target_modules=["q_proj", "up_proj"], r=3, use_rslora=True),
        make_adapter(base, tmp_path / "c", seed=3, target_modules=["q_proj", "v_proj"], r=3, lora_bias=True),
    ]
    pairs = list(zip(adapters, weights, strict=True))
    merge(base, adapters if weights == (1.0, 1.0, 1.0) else pairs, tmp_path / "out")
    merge(base, dict(pairs), tmp_path / "dict")
    model = peft_model(base, *adapters)
    for module in model.modules():
        for number, weight in enumerate(weights):
            if isinstance(module, LoraLayer) and str(number) in module.scaling:
                module.scaling[str(number)] *= weight
    assert_same(stored(tmp_path / "out"), rounded_tensors(peft_merged(model)))
    assert_same(stored(tmp_path / "dict"), stored(tmp_path / "out"))


def test_a_weighted_dora_and_others_add_what_each_alone_would_change(bases, tmp_path):
    """PEFT multiplies one DoRA's factor onto the other's update, and so depends on the order (peft #3608)."""
    base = bases["untied"]
    dora = make_adapter(base, tmp_path / "a", seed=1, target_modules=["q_proj", "down_proj"], use_dora=True)
    other = make_adapter(base, tmp_path / "b", seed=2, target_modules=LINEAR, use_dora=True)
    plain = make_adapter(base, tmp_path / "c", seed=3, target_modules=["q_proj"], use_rslora=True)
    weights = {dora: 0.5, other: 1.0, plain: -2.0}
    merge(base, weights, tmp_path / "out")
    merge(base, dict(reversed(weights.items())), tmp_path / "reversed")
    start = load(base).state_dict()
    alone = {adapter: peft_merged(peft_model(base, adapter)).state_dict() for adapter in weights}
    for folder in ("out", "reversed"):
        for name, tensor in stored(tmp_path / folder).items():
            expected = start[name].double()
            for adapter, weight in weights.items():
                expected = expected + weight * (alone[adapter][name].double() - start[name].double())
            error = (tensor.double() - expected).abs()
            assert bool((error <= expected.abs() * 2**-8 * 1.001 + 1e-7).all()), name


def test_weighted_replacements_go_part_of_the_way(bases, tmp_path):
    base = bases["untied"]
    settings = {"modules_to_save": ["norm"], "bias": "all", "trainable_token_indices": [1, 2]}
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    merge(base, {adapter: 0.25}, tmp_path / "out")
    start, whole = load(base).state_dict(), peft_merged(peft_model(base, adapter)).state_dict()
    for name, tensor in stored(tmp_path / "out").items():
        expected = start[name].double() + 0.25 * (whole[name].double() - start[name].double())
        assert torch.allclose(tensor.double(), expected, rtol=2**-8, atol=1e-6), name


def test_two_adapters_with_other_new_tokens(bases, tmp_path):
    base = bases["untied"]
    one = make_adapter(base, tmp_path / "a", seed=1, target_modules=["q_proj"], trainable_token_indices=[4, 5])
    two = make_adapter(base, tmp_path / "b", seed=2, target_modules=["k_proj"], trainable_token_indices=[9, 1])
    merge(base, [one, two], tmp_path / "out")
    ours = stored(tmp_path / "out")["model.embed_tokens.weight"]
    first = rounded_tensors(peft_merged(peft_model(base, one)))["model.embed_tokens.weight"]
    second = rounded_tensors(peft_merged(peft_model(base, two)))["model.embed_tokens.weight"]
    assert torch.equal(ours[[4, 5]], first[[4, 5]])
    assert torch.equal(ours[[9, 1]], second[[9, 1]])
    assert torch.equal(ours[10:], stored(base)["model.embed_tokens.weight"][10:])


# tied embeddings

COMING_APART = {
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "both adapted": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "DoRA on both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "other tokens on each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 5]},
    },
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 5]}},
}


@pytest.mark.parametrize("settings", COMING_APART.values(), ids=COMING_APART.keys())
def test_tied_embeddings_come_apart_where_an_adapter_changes_one_side(bases, tmp_path, settings):
    """PEFT adds the update of one side to the tensor that both share; on a base with two tensors it does not."""
    base = bases["tied"]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    report = merge(base, adapter, tmp_path / "out")
    twin = untied_twin(base, tmp_path / "twin")
    assert_same(stored(tmp_path / "out"), rounded_tensors(peft_merged(peft_model(twin, adapter))))
    assert report.untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    _same_behaviour(tmp_path / "out", peft_model(base, adapter))


STAYING_TOGETHER = {
    "nothing of the tables": {"target_modules": ["q_proj"]},
    "saved copies": {"target_modules": ["q_proj"], "save": True},
    "tied adapters": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied adapters, other way": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tied modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]},
    "same tokens on both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]},
    },
    "resized": {"target_modules": ["q_proj"], "resize": 171},
    "resized, tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [165, 2], "resize": 171},
}


@pytest.mark.parametrize("settings", STAYING_TOGETHER.values(), ids=STAYING_TOGETHER.keys())
def test_tied_embeddings_stay_tied_where_both_sides_change_alike(bases, tmp_path, settings):
    base = bases["tied"]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    report = merge(base, adapter, tmp_path / "out")
    assert not report.untied
    assert "lm_head.weight" not in stored(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    unmerged = peft_model(base, adapter, resize=settings.get("resize", 0))
    _same_behaviour(tmp_path / "out", unmerged)
    if "ensure_weight_tying" not in settings or "modules_to_save" in settings:
        theirs = rounded_tensors(peft_merged(unmerged))
        theirs.pop("lm_head.weight")
        assert_same(stored(tmp_path / "out"), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_a_resized_tied_vocabulary_that_comes_apart(bases, tmp_path, settings):
    base = bases["tied"]
    adapter = make_adapter(base, tmp_path / "adapter", resize=171, **settings)
    report = merge(base, adapter, tmp_path / "out")
    assert report.untied
    assert report.vocab_size == 171
    _same_behaviour(tmp_path / "out", peft_model(base, adapter, resize=171))


def test_a_tied_base_that_holds_its_head_twice(bases, tmp_path):
    """transformers ties it where both are the same, and unties it where they are not."""
    same = untied_twin(bases["tied"], tmp_path / "same")
    config = json.loads((bases["tied"] / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(bases["tied"], tmp_path / "adapter", target_modules=["q_proj"])
    assert merge(same, adapter, tmp_path / "one").tie_word_embeddings
    assert "lm_head.weight" not in stored(tmp_path / "one")
    other = untied_twin(bases["tied"], tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, other / "model.safetensors")
    report = merge(other, adapter, tmp_path / "two")
    assert not report.tie_word_embeddings
    assert torch.equal(stored(tmp_path / "two")["lm_head.weight"], tensors["lm_head.weight"])


def _same_behaviour(out: Path, unmerged) -> None:
    """The merged checkpoint, read back in float32, computes what the unmerged model does, up to bf16's rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = logits(load(out))
    theirs = logits(unmerged)
    assert ours.shape == theirs.shape
    scale = theirs.std()
    assert (ours - theirs).abs().max() < 0.05 * scale
