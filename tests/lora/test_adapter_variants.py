"""Kinds of LoRA beyond the plain one, trained and saved by PEFT: beside the base they answer as under PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import KasaConfig, LoraConfig, LoraGAConfig, MontecloraConfig, VeloraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file

import qwen_vram as qv
from tests.conftest import make_checkpoint
from tests.helpers.lora_models import IDS, edit_config, edit_tensors, logits, peft_merged, peft_model
from tests.helpers.lora_models import load as plain
from tests.helpers.tiers import thinned

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 2048}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYER = "base_model.model.model.layers.1.mlp.down_proj"
WITH_PEFT = r"merge it with PEFT itself \(merge_and_unload\), and pass the result as the model"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "untied": make_checkpoint(root / "untied", **SHAPE),
        "tied": make_checkpoint(root / "tied", tied=True, **SHAPE),
        "qwen3": make_checkpoint(root / "qwen3", kind="qwen3", **SHAPE),
    }


def trained(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter after three steps of training in float32; no tensor of it is zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", **settings)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        model.save_pretrained(folder)
    assert all(tensor.abs().max() > 1e-4 for tensor in load_file(folder / "adapter_model.safetensors").values())
    return folder


def load(model: object, adapter: object = None, **knobs: Any) -> qv.LoadedModel:
    return qv.load(
        model, adapter=adapter, **{"profile": "default", "weights": "fp32", "device": "cpu", "progress": False, **knobs}
    )


def kept_bytes(model: torch.nn.Module) -> int:
    """The parameters of a model, and all buffers that PEFT put in."""
    buffers = [buffer for name, buffer in model.named_buffers() if ".lora_" in name]
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *buffers)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


KINDS: dict[str, dict[str, Any]] = {
    "KaSA": {"target_modules": ["q_proj", "down_proj"], "kasa_config": KasaConfig()},
    "KaSA everywhere": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7, "kasa_config": KasaConfig(beta=1e-3)},
    "KaSA of the head": {"target_modules": ["v_proj", "lm_head"], "r": 5, "kasa_config": KasaConfig()},
    "KaSA by patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2},
        "use_rslora": True,
        "kasa_config": KasaConfig(),
    },
    "KaSA with biases": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "kasa_config": KasaConfig()},
    "VeLoRA": {"target_modules": ["q_proj", "down_proj"], "velora_config": VeloraConfig(num_groups=8)},
    "VeLoRA everywhere": {
        "target_modules": "all-linear",
        "r": 3,
        "lora_alpha": 7,
        "velora_config": VeloraConfig(num_groups=5, init_type="random"),
    },
    "VeLoRA of the head": {
        "target_modules": ["v_proj", "lm_head"],
        "r": 5,
        "velora_config": VeloraConfig(num_groups=4, init_type="batch_average"),
    },
    "MonteCLoRA": {
        "target_modules": ["q_proj", "down_proj"],
        "r": 4,
        "monteclora_config": MontecloraConfig(num_samples=4, buffer_size=4),
    },
    "BD-LoRA": {
        "target_modules": ["q_proj", "down_proj"],
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=4),
    },
    "BD-LoRA with plain ones": {
        "target_modules": LINEAR,
        "use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj", "up_proj"], nblocks=2, match_strict=False),
    },
    "BD-LoRA with biases": {
        "target_modules": ["q_proj", "k_proj"],
        "lora_bias": True,
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["k_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
    },
    "QALoRA": {"target_modules": ["q_proj", "down_proj"], "use_qalora": True},
    "a bias where the base has none": {"target_modules": ["o_proj", "down_proj"], "lora_bias": True},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.parametrize(*thinned(1, kind=list(KINDS), base=["untied", "tied", "qwen3"]))
def test_it_answers_as_under_peft_and_is_counted(bases, tmp_path, kind, base):
    if base == "qwen3" and KINDS[kind].get("lora_bias"):
        pytest.skip("its projections have no biases")
    folder = trained(bases[base], tmp_path / "adapter", **KINDS[kind])
    with load(bases[base], folder) as llm:
        expected = logits(peft_model(bases[base], folder))
        assert torch.equal(logits(llm.model), expected)
        assert (expected - logits(plain(bases[base]))).abs().max() > 0.01
        assert kept_bytes(llm.model) == llm.plan.estimate.weights == llm.report().measured["weights"]
    assert qv.estimate_vram(bases[base], weights="fp32", adapter=folder).weights == llm.plan.estimate.weights


@pytest.mark.parametrize(*thinned(1, kind=["KaSA", "VeLoRA", "BD-LoRA", "MonteCLoRA"], weights=["bf16", "fp16"]))
def test_in_16_bits_too(bases, tmp_path, kind, weights):
    from peft import PeftModel

    folder = trained(bases["untied"], tmp_path / "adapter", **KINDS[kind])
    dtype = torch.bfloat16 if weights == "bf16" else torch.float16
    theirs = PeftModel.from_pretrained(plain(bases["untied"], dtype=dtype), folder, autocast_adapter_dtype=False)
    with load(bases["untied"], folder, weights=weights) as llm:
        assert torch.equal(logits(llm.model), logits(theirs))
        assert kept_bytes(llm.model) == llm.plan.estimate.weights


@pytest.mark.parametrize(*thinned(1, kind=["VeLoRA", "MonteCLoRA", "QALoRA"], weights=["nf4", "int8-wo"]))
def test_what_is_plain_lora_outside_training_runs_beside_quantized_weights(bases, tmp_path, kind, weights):
    """As the same tensors do in an adapter that is a plain LoRA by its settings too."""
    folder = trained(bases["untied"], tmp_path / "adapter", **KINDS[kind])
    with load(bases["untied"], folder, weights=weights) as llm:
        found = logits(llm.model)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
    edit_config(folder, velora_config=None, monteclora_config=None, use_qalora=False)
    with load(bases["untied"], folder, weights=weights) as llm:
        assert torch.equal(found, logits(llm.model))


# what is refused beside the base


BESIDE_16_BITS = {
    "KaSA": r"begins with a decomposition of the base's 16-bit weights \(KaSA cuts off their smallest",
    "BD-LoRA": r"has block-diagonal factors \(BD-LoRA in use_bdlora\), which PEFT puts beside matrices in 16 or 32",
}


@pytest.mark.parametrize(*thinned(1, weights=["nf4", "int8", "int8-wo", "fp8"], kind=list(BESIDE_16_BITS)))
def test_beside_quantized_weights_it_is_refused(bases, tmp_path, kind, weights):
    base, text = bases["untied"], BESIDE_16_BITS[kind]
    folder = trained(base, tmp_path / "adapter", **KINDS[kind])
    for call in (load, qv.plan):
        with pytest.raises(
            qv.NotSupportedError,
            match=rf"weights='{weights}': the adapter {text}.*; use weights='bf16', or {WITH_PEFT}",
        ) as caught:
            call(base, adapter=folder, weights=weights, profile="default")
        assert caught.value.knob == "weights"
    load(base, folder, weights="bf16").close()


def test_kasa_on_streamed_layers_is_refused(bases, tmp_path):
    base = bases["untied"]
    folder = trained(base, tmp_path / "adapter", **KINDS["KaSA"])
    text = rf"streamed_layers=1: the adapter begins with .*KaSA.*; use streamed_layers=0, or {WITH_PEFT}"
    for call in (load, qv.plan):
        with pytest.raises(qv.NotSupportedError, match=text):
            call(base, adapter=folder, weights="bf16", streamed_layers=1, profile="default")
    load(base, folder, weights="bf16", streamed_layers=0).close()
    least = qv.min_vram(base, adapter=folder)
    assert not qv.plan(base, vram=least, ram="8GiB", adapter=folder).profile.streamed_layers


@pytest.mark.parametrize(*thinned(1, kind=["KaSA", "BD-LoRA", "KaSA of the head"], base=["untied", "tied"]))
def test_the_merge_by_peft_that_is_advised(bases, tmp_path, kind, base):
    if (kind, base) == ("KaSA of the head", "tied"):
        pytest.skip("PEFT itself merges into both sides of tied tables")
    folder = trained(bases[base], tmp_path / "adapter", **KINDS[kind])
    with pytest.raises(qv.AdapterError, match=f"is set: .*, so it cannot be merged exactly; {WITH_PEFT}"):
        qv.merge_lora_then_quantize(bases[base], folder, tmp_path / "out")
    model = peft_model(bases[base], folder)
    expected = logits(model)
    peft_merged(model).save_pretrained(tmp_path / "merged")
    for file in bases[base].glob("token*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    with load(tmp_path / "merged") as llm:
        assert torch.allclose(logits(llm.model), expected, atol=1e-5)
    load(tmp_path / "merged", weights="nf4").close()


def test_factors_of_groups_of_inputs_are_refused(bases, tmp_path):
    base = bases["untied"]
    folder = trained(base, tmp_path / "adapter", **KINDS["QALoRA"])

    def pool(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "lora_A" in key]:
            tensors[key] = tensors[key].reshape(8, -1, 16).sum(-1)

    edit_tensors(folder, pool)
    text = r"lora_A\.weight has shape \[8, 8\], \[8, 128\] is needed.*; its factors are of groups of inputs \(QALoRA\)"
    for call in (load, qv.plan):
        with pytest.raises(qv.AdapterError, match=text):
            call(base, adapter=folder)


@pytest.mark.parametrize(
    ("kind", "spoil", "text"),
    [
        ("KaSA", lambda t: t.pop(f"{LAYER}.lora_diag"), r"down_proj\.lora_diag is missing; copy the whole file"),
        (
            "KaSA",
            lambda t: t.update({f"{LAYER}.lora_diag": torch.ones(3)}),
            r"lora_diag has shape \[3\], \[8\] is needed",
        ),
        (
            "VeLoRA",
            lambda t: t.update({f"{LAYER}.lora_diag": torch.ones(8)}),
            "lora_diag is there, and no setting asks",
        ),
        ("BD-LoRA", lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(8, 128)}), r"\[8, 32\] is needed"),
    ],
)
def test_tensors_that_contradict_the_settings(bases, tmp_path, kind, spoil, text):
    folder = trained(bases["untied"], tmp_path / "adapter", **KINDS[kind])
    edit_tensors(folder, spoil)
    for call in (load, qv.plan):
        with pytest.raises(qv.AdapterError, match=text):
            call(bases["untied"], adapter=folder)


def test_kasa_with_the_adapters_name_in_its_keys(bases, tmp_path):
    base = bases["untied"]
    folder = trained(base, tmp_path / "adapter", **KINDS["KaSA"])
    expected = logits(peft_model(base, folder))

    def in_memory(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            named = f"{key}.default" if key.endswith("diag") else key.replace(".weight", ".default.weight")
            tensors[named] = tensors.pop(key)

    edit_tensors(folder, in_memory)
    with load(base, folder) as llm:
        assert torch.equal(logits(llm.model), expected)


# parameters that are named themselves

PARAMETERS: dict[str, dict[str, Any]] = {
    "with modules": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "alone": {"target_modules": [], "target_parameters": ["up_proj.weight"], "lora_alpha": 32},
    "head": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    "by patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"],
        "rank_pattern": {"q_proj.weight": 4},
        "alpha_pattern": {r"mlp\.up_proj\.weight": 32},
    },
    "where modules are left out": {
        "target_modules": ["v_proj"],
        "target_parameters": ["q_proj.weight"],
        "layers_to_transform": [1],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(*thinned(1, kind=list(PARAMETERS), base=["untied", "tied"]))
def test_parameters_that_are_named_run_as_their_modules(bases, tmp_path, kind, base):
    """PEFT adds the product to the matrix in every step; here it is added to the result."""
    folder = trained(bases[base], tmp_path / "adapter", **PARAMETERS[kind])
    with load(bases[base], folder) as llm:
        assert torch.allclose(logits(llm.model), logits(peft_model(bases[base], folder)), atol=1e-5)
        assert kept_bytes(llm.model) == llm.plan.estimate.weights
    load(bases[base], folder, weights="nf4").close()
    with pytest.raises(qv.AdapterError, match=f"target_parameters is set: .*; {WITH_PEFT}"):
        qv.merge_lora_then_quantize(bases[base], folder, tmp_path / "out")


TABLE_PARAMETERS: dict[str, dict[str, Any]] = {
    "with modules": {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
    "alone": {"target_modules": [], "target_parameters": ["model.embed_tokens.weight"]},
    "kept tied": {
        "target_modules": ["q_proj"],
        "target_parameters": ["embed_tokens.weight"],
        "ensure_weight_tying": True,
    },
    "by patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": ["embed_tokens.weight", "up_proj.weight"],
        "rank_pattern": {"embed_tokens.weight": 3},
        "alpha_pattern": {"model.embed_tokens.weight": 40},
        "use_rslora": True,
    },
    "with the head": {"target_modules": [], "target_parameters": ["embed_tokens.weight", "lm_head.weight"]},
    "with a whole head": {
        "target_modules": ["q_proj"],
        "target_parameters": ["embed_tokens.weight"],
        "modules_to_save": ["lm_head"],
    },
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:You passed `ensure_weight_tying=True`")
@pytest.mark.parametrize(*thinned(1, kind=list(TABLE_PARAMETERS), base=["untied", "tied"]))
def test_a_table_that_is_named_as_a_parameter(bases, tmp_path, kind, base):
    """PEFT adds the product to the whole table in every step; here it is added to the rows that are looked up."""
    folder = trained(bases[base], tmp_path / "adapter", **TABLE_PARAMETERS[kind])
    with load(bases[base], folder) as llm:
        expected = logits(peft_model(bases[base], folder))
        assert torch.allclose(logits(llm.model), expected, atol=1e-5)
        assert (expected - logits(plain(bases[base]))).abs().max() > 0.01
        assert kept_bytes(llm.model) == llm.plan.estimate.weights == llm.report().measured["weights"]
        largest = largest_tensor(llm.model)
    assert largest < load_file(bases[base] / "model.safetensors")["model.embed_tokens.weight"].numel()
    with pytest.raises(qv.AdapterError, match=f"target_parameters is set: .*; {WITH_PEFT}"):
        qv.merge_lora_then_quantize(bases[base], folder, tmp_path / "out")


def largest_tensor(model: torch.nn.Module) -> int:
    """Elements of the largest tensor that a forward pass makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            inputs = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, result.numel())
            return result

    with Watch() as watch:
        logits(model)
    return watch.largest


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_a_table_as_a_parameter_beside_other_weights(bases, tmp_path, weights):
    """As the same factors do in an adapter of the embedding itself."""
    base = bases["untied"]
    folder = trained(base, tmp_path / "adapter", **TABLE_PARAMETERS["with modules"])
    with load(base, folder, weights=weights) as llm:
        found = logits(llm.model)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights

    def of_the_embedding(tensors: dict[str, torch.Tensor]) -> None:
        table = "base_model.model.model.embed_tokens"
        tensors[f"{table}.lora_embedding_A"] = tensors.pop(f"{table}.lora_B.weight").T.contiguous()
        tensors[f"{table}.lora_embedding_B"] = tensors.pop(f"{table}.lora_A.weight").T.contiguous()

    edit_tensors(folder, of_the_embedding)
    edit_config(folder, target_parameters=None, target_modules=["q_proj", "embed_tokens"])
    with load(base, folder, weights=weights) as llm:
        assert torch.equal(found, logits(llm.model))


@pytest.mark.parametrize(*thinned(1, init=["pissa", "olora"], base=["untied", "tied"]))
def test_a_table_as_a_parameter_that_training_changed_before(bases, tmp_path, init, base):
    folder = trained(bases[base], tmp_path / "adapter", init_lora_weights=init, **TABLE_PARAMETERS["with modules"])
    text = f"target_parameters names 'embed_tokens.weight', and init_lora_weights is '{init}', which changed the token"
    for call in (load, qv.plan):
        with pytest.raises(qv.AdapterError, match=f"{text}.*; {WITH_PEFT}"):
            call(bases[base], adapter=folder)


# layers that are the base's in another order or number


LAYERS: dict[str, list[list[int]]] = {
    "the base": [[0, 3]],
    "the base in parts": [[0, 1], [1, 1], [1, 3]],
    "the first": [[0, 2]],
    "some": [[0, 1], [2, 3]],
    "another order": [[2, 3], [0, 2]],
    "one twice": [[0, 2], [1, 2]],
}
TARGETS: dict[str, dict[str, Any]] = {
    "one matrix": {"target_modules": ["q_proj"]},
    "all": {"target_modules": "all-linear", "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "use_rslora": True},
    "of one layer": {"target_modules": ["down_proj"], "layers_to_transform": [1], "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("of_three")
    shape = {**SHAPE, "num_hidden_layers": 3}
    return {
        "untied": make_checkpoint(root / "untied", **shape),
        "tied": make_checkpoint(root / "tied", tied=True, **shape),
        "qwen3": make_checkpoint(root / "qwen3", kind="qwen3", **shape),
    }


@pytest.mark.parametrize(
    *thinned(
        1,
        kind=tuple(LAYERS),
        case=[*(("untied", targets) for targets in TARGETS), ("tied", "all"), ("qwen3", "all")],
    ),
    ids=str,
)
def test_other_layers_than_the_bases(of_three, tmp_path, kind, case):
    """Under PEFT copies of a layer share its weights; here each has its own, and all are counted."""
    base, targets = case
    folder = trained(of_three[base], tmp_path / "adapter", layer_replication=LAYERS[kind], **TARGETS[targets])
    theirs = peft_model(of_three[base], folder)
    expected = logits(theirs)
    assert (expected - logits(plain(of_three[base]))).abs().max() > 0.01
    with load(of_three[base], folder) as llm:
        assert torch.equal(logits(llm.model), expected)
        steps = {"input_ids": IDS, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert torch.equal(llm.model.generate(**steps), theirs.generate(**steps))
        assert kept_bytes(llm.model) == llm.plan.estimate.weights == llm.report().measured["weights"]
        layers = sum(end - first for first, end in LAYERS[kind])
        assert llm.model.config.num_hidden_layers == layers == len(llm.model.base_model.model.model.layers)
        alone = qv.estimate_vram(of_three[base], weights="fp32")
        assert llm.plan.estimate.kv_cache * 3 == alone.kv_cache * layers
    assert qv.estimate_vram(of_three[base], weights="fp32", adapter=folder).weights == llm.plan.estimate.weights
    again = qv.Architecture.from_dict(json.loads(json.dumps(llm.plan.estimate.architecture.to_dict())))
    assert again == llm.plan.estimate.architecture
    out = tmp_path / "out"
    if kind.startswith("the base"):
        qv.merge_lora_then_quantize(of_three[base], folder, out, quantize=None, device="cpu", progress=False)
        with load(out) as llm:
            assert torch.allclose(logits(llm.model), expected, atol=0.05)
    else:
        text = r"layer_replication is set: .* so it cannot be merged exactly; run it beside its base: qv\.load\(base"
        with pytest.raises(qv.AdapterError, match=text):
            qv.merge_lora_then_quantize(of_three[base], folder, out)


@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8-wo"])
def test_other_layers_in_other_formats(of_three, tmp_path, weights):
    """As a base that holds these layers as its own."""
    base, settings = of_three["untied"], {"target_modules": ["q_proj", "up_proj"]}
    folder = trained(base, tmp_path / "adapter", layer_replication=LAYERS["one twice"], **settings)
    with load(base, folder, weights=weights) as llm:
        found = logits(llm.model)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
    own = tmp_path / "own"
    model = plain(base, dtype=torch.bfloat16)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(layers[number]) for number in (0, 1, 1))
    model.save_pretrained(own)
    for file in base.glob("token*"):
        (own / file.name).write_bytes(file.read_bytes())
    edit_config(folder, layer_replication=None)
    with load(own, folder, weights=weights) as llm:
        assert torch.equal(found, logits(llm.model))


@pytest.mark.parametrize("replication", [[[0, 2], [1, 2]], [[0, 2], [0, 2]], [[1, 2], [0, 2], [1, 2]]], ids=str)
def test_more_layers_than_the_bases(bases, tmp_path, monkeypatch, replication):
    """transformers fails on such a model of PEFT for want of the kinds of its layers, unless it is told them."""
    base, layers, untold = bases["untied"], sum(end - first for first, end in replication), plain

    def told(folder: Path, **options: Any) -> Any:
        model = untold(folder, **options)
        model.config.layer_types = ["full_attention"] * layers
        return model

    monkeypatch.setitem(globals(), "plain", told)
    monkeypatch.setattr("tests.helpers.lora_models.load", told)
    folder = trained(base, tmp_path / "adapter", layer_replication=replication, target_modules=["q_proj", "down_proj"])
    with load(base, folder) as llm:
        assert torch.equal(logits(llm.model), logits(peft_model(base, folder)))
        assert kept_bytes(llm.model) == llm.plan.estimate.weights == llm.report().measured["weights"]


def test_other_layers_that_are_refused(of_three, tmp_path):
    base = of_three["untied"]
    folder = trained(base, tmp_path / "adapter", layer_replication=LAYERS["one twice"], target_modules=["q_proj"])
    refusals = {
        r"layer_replication is \[\[0, 4\]\], and the base 'untied' has 3 layers, 0 to 2; pass the base": [[0, 4]],
        r"layer_replication is \[\[-1, 2\]\], and the base 'untied' has 3 layers": [[-1, 2]],
        r"layer_replication must name at least one layer, got \[\[1, 1\]\]": [[1, 1]],
        r"layer_replication must be a list of pairs of layer numbers, got \[0, 3\]": [0, 3],
        r"layer_replication must be a list of pairs of layer numbers, got 'all'": "all",
        r"layers\.2\.self_attn\.q_proj is not in it": [[0, 2]],
        r"layers\.3\.self_attn\.q_proj\.lora_A\.weight is missing": [[0, 3], [1, 2]],
    }
    for text, replication in refusals.items():
        edit_config(folder, layer_replication=replication)
        for call in (load, qv.plan, qv.estimate_vram):
            with pytest.raises(qv.AdapterError, match=text):
                call(base, adapter=folder)
    edit_config(folder, layer_replication=LAYERS["one twice"], init_lora_weights="pissa")
    with pytest.raises(qv.AdapterError, match="init_lora_weights changes weights that PEFT's copies of a layer share"):
        load(base, folder)
    edit_config(folder, init_lora_weights=True)
    text = "streamed_layers=1: the adapter is of a model of other layers than the base .*; use streamed_layers=0"
    for call in (load, qv.plan):
        with pytest.raises(qv.NotSupportedError, match=text):
            call(base, adapter=folder, weights="bf16", streamed_layers=1, profile="default")
    least = qv.min_vram(base, adapter=folder)
    assert not qv.plan(base, vram=least, ram="8GiB", adapter=folder).profile.streamed_layers


def test_other_layers_than_those_of_a_quantized_base(of_three, tmp_path):
    base, stored = of_three["untied"], tmp_path / "stored"
    with load(base, weights="nf4") as llm:
        llm.save_quantized(stored)
    folder = trained(base, tmp_path / "adapter", layer_replication=LAYERS["the base"], target_modules=["q_proj"])
    with load(base, folder, weights="nf4") as llm:
        expected = logits(llm.model)
    with load(stored, folder, weights="nf4") as llm:
        assert torch.equal(logits(llm.model), expected)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
    edit_config(folder, layer_replication=LAYERS["another order"])
    load(base, folder, weights="nf4").close()
    text = r"layer_replication is .*, and the base 'stored' is stored as 'nf4', .*; pass the 16-bit base"
    for call in (load, qv.plan):
        with pytest.raises(qv.AdapterError, match=text):
            call(stored, adapter=folder, weights="nf4")


def test_a_table_as_a_parameter_stays_on_the_device(bases, tmp_path):
    base = bases["untied"]
    folder = trained(base, tmp_path / "adapter", **TABLE_PARAMETERS["alone"])
    for call in (load, qv.plan):
        with pytest.raises(qv.NotSupportedError, match="embeddings='host': the adapter changes 'model.embed_tokens'"):
            call(base, adapter=folder, weights="bf16", embeddings="host", profile="default")


# merges


@pytest.mark.parametrize(
    *thinned(
        1,
        settings=[{"r": 3, "use_rslora": True}, {"r": 8, "lora_alpha": 3}, {"r": 16}],
        kind=[
            {"velora_config": VeloraConfig(num_groups=5)},
            {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
        ],
    )
)
def test_the_merge_is_pefts_in_float64(tmp_path, kind, settings):
    """Up to float32's rounding of the product and of the sum."""
    base = make_checkpoint(tmp_path / "base", **SHAPE)
    plain(base).save_pretrained(base)  # in float32
    folder = trained(base, tmp_path / "adapter", target_modules=LINEAR, **copy.deepcopy(kind), **settings)
    qv.merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(plain(base, dtype=torch.float64), folder, autocast_adapter_dtype=False)
    theirs = model.merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")
    changed = 0
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float64
        off, update = (ours[name].double() - tensor).abs(), (tensor - before[name].double()).abs()
        assert (off <= tensor.abs() * 2**-24 + update.max() * 2**-22).all(), name
        changed += not torch.equal(ours[name], before[name])
    assert changed == 2 * len(LINEAR)


# a base that was changed before training


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_on_the_changed_base_that_is_advised(bases, tmp_path):
    """PEFT would put the adapter on the base as it was, without a word."""
    base, model = bases["untied"], plain(bases["untied"])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    changed = tmp_path / "changed"
    model.unload().save_pretrained(changed)
    for file in base.glob("token*"):
        (changed / file.name).write_bytes(file.read_bytes())
    text = (
        "init_lora_weights is 'lora_ga', .*; or, if the base here is the changed one that training saved, set init_lora"
    )
    for call in (load, qv.plan):
        with pytest.raises(qv.AdapterError, match=text):
            call(base, adapter=tmp_path / "adapter")
    edit_config(tmp_path / "adapter", init_lora_weights=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True
    with load(changed, tmp_path / "adapter") as llm:
        assert torch.allclose(logits(llm.model), expected, atol=1e-5)
