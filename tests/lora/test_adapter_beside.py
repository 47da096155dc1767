"""An adapter beside its base: counted to the byte, run as PEFT runs it, or refused by the knob that is in its way."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import qwen_vram as qv
from qwen_vram.checkpoints.adapters.base_name import same_model
from qwen_vram.planning.support import not_loadable
from tests.conftest import make_checkpoint
from tests.helpers.lora_models import edit_config, edit_tensors, logits, make_adapter, peft_model
from tests.helpers.tiers import thinned

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 2048}
LAYER = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "untied": make_checkpoint(root / "untied", **SHAPE),
        "tied": make_checkpoint(root / "tied", tied=True, **SHAPE),
        "qwen3": make_checkpoint(root / "qwen3", kind="qwen3", **SHAPE),
    }


def load(model: object, adapter: object = None, **knobs: Any) -> qv.LoadedModel:
    return qv.load(model, adapter=adapter, **{"profile": "default", "weights": "fp32", "progress": False, **knobs})


# counted

COUNTED: dict[str, dict[str, Any]] = {
    "biases": {"bias": "all"},
    "biases of adapted modules": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "tables saved": {"save": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole table": {"modules_to_save": ["embed_tokens"]},
    "whole tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole norm": {"modules_to_save": ["norm"]},
    "whole matrix": {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]},
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7]}},
    "tied tokens": {"trainable_token_indices": [5, 6], "ensure_weight_tying": True},
    "tied table": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied head": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tied whole table": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied whole tables": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}
# `make test` leaves out what reaches no table, on the second base, and tables that are tied where the base's are not.
NO_TABLE = ("biases", "biases of adapted modules", "lora_bias", "whole norm", "whole matrix")
# Of what reaches one table, it has each on one of the bases.
ON_UNTIED, ON_TIED = ("tables saved", "whole table", "head"), ("whole head", "table", "whole tables")
ON_BASES = [
    pytest.param(base, kind, marks=[pytest.mark.full] if other else [])
    for kind in COUNTED
    for base, other in (
        ("untied", kind.startswith("tied") or kind in ON_TIED),
        ("tied", kind in NO_TABLE or kind in ON_UNTIED),
    )
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`", "ignore:ensure_weight_tying=True but")
@pytest.mark.parametrize(("base", "kind"), ON_BASES)
def test_what_peft_keeps_is_what_is_counted(bases, tmp_path, base, kind):
    folder = make_adapter(
        bases[base], tmp_path / "adapter", **{"target_modules": ["q_proj", "v_proj"], **COUNTED[kind]}
    )
    with load(bases[base], folder) as llm:
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
        assert torch.equal(logits(llm.model), logits(peft_model(bases[base], folder)))
    assert qv.estimate_vram(bases[base], weights="fp32", adapter=folder).weights == llm.plan.estimate.weights


@pytest.mark.parametrize(
    *thinned(
        1,
        weights=["nf4", "int8", "int8-wo", "fp8"],
        kind=["biases", "tables saved", "whole head", "tied whole table"],
    )
)
def test_beside_quantized_weights_too(bases, tmp_path, weights, kind):
    settings = {"target_modules": ["q_proj", "v_proj"], **COUNTED[kind]}
    base = bases["tied" if kind.startswith("tied") else "untied"]
    folder = make_adapter(base, tmp_path / "adapter", **settings)
    with load(base, folder, weights=weights) as llm:
        assert llm.report().measured["weights"] == llm.plan.estimate.weights


# a resized vocabulary

RESIZED: dict[str, dict[str, Any]] = {
    "both tables trained": {"resize": 3080, "modules_to_save": ["embed_tokens", "lm_head"]},
    "both tables saved": {"resize": 3080, "save": True},
    "fewer rows": {"resize": 3064, "modules_to_save": ["embed_tokens", "lm_head"]},
    "new tokens": {"resize": 3080, "save": True, "trainable_token_indices": [3072, 3073]},
    "factors of the tables": {"resize": 3080, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", RESIZED)
def test_a_resized_vocabulary_is_merged_and_then_runs(bases, tmp_path, kind):
    base, rows = bases["untied"], RESIZED[kind]["resize"]
    folder = make_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **RESIZED[kind]})
    text = rf"holds {rows:,} rows of model\.embed_tokens\.weight, and the base 'untied' has 3,072: .*; merge it, .*: "
    for call in (lambda: load(base, folder), lambda: qv.estimate_vram(base, adapter=folder)):
        with pytest.raises(qv.AdapterError, match=text + r"qv\.merge_lora_then_quantize\(base, adapter, out\)"):
            call()
    report = qv.merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)
    assert report.vocab_size == rows
    with load(tmp_path / "out") as llm:
        assert torch.allclose(logits(llm.model), logits(peft_model(base, folder, resize=rows)), atol=0.05)


# activated LoRA


@pytest.fixture(scope="module")
def activated(bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It acts behind the tokens with which the chat template opens an answer."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(bases["untied"]).encode("assistant\n")
    folder = tmp_path_factory.mktemp("activated") / "adapter"
    settings = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 32, "alora_invocation_tokens": tokens}
    return make_adapter(bases["untied"], folder, size=0.2, **settings)


@pytest.mark.parametrize("question", ["hi", "What is 12 + 30?", "Tell me more about this and that, and so on and on."])
def test_an_activated_lora_answers_as_under_peft(bases, activated, question):
    base, messages = bases["untied"], [{"role": "user", "content": question}]
    with load(base, activated, cache="preallocated") as llm:
        inputs = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        told = peft_model(base, activated).generate(**inputs, do_sample=False, max_new_tokens=8)
        told = llm.tokenizer.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert llm.chat(messages, do_sample=False, max_new_tokens=8) == told
        assert "".join(llm.stream(messages, do_sample=False, max_new_tokens=8)) == told


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"prefill_chunk_size": 16}, "prefill_chunk_size=16: the adapter looks .* use prefill_chunk_size=None"),
        ({"prefill_chunk_size": 1024}, "prefill_chunk_size=1024: the adapter"),
        ({"profile": "compact", "weights": "nf4"}, "prefill_chunk_size=512: the adapter"),
        ({"cache": "static", "compiled": True, "kernels": "fused", "attention": "fused"}, "compiled=True: the adapter"),
    ],
    ids=str,
)
def test_what_an_activated_lora_cannot_see(bases, activated, knobs, text):
    for call in (qv.plan, load):
        with pytest.raises(qv.NotSupportedError, match=text) as caught:
            call(bases["untied"], adapter=activated, **{"profile": "default", **knobs})
        assert caught.value.knob in text


def test_plans_leave_chunks_out_for_it(bases, activated):
    base = bases["untied"]
    work = {"prompt_len": 1_900, "max_new_tokens": 100, "batch_size": 16}
    least = qv.min_vram(base, adapter=activated, **work)
    assert qv.plan(base, vram=least, ram="8GiB", adapter=activated, **work).profile.prefill_chunk_size is None
    least = qv.min_vram(base, **work)
    assert qv.plan(base, vram=least, ram="8GiB", **work).profile.prefill_chunk_size is not None


def test_an_activated_lora_is_not_merged(bases, activated, tmp_path):
    text = r"an activated LoRA acts on part of the text only, .*; run it beside its base: qv\.load\(base, adapter="
    with pytest.raises(qv.AdapterError, match=text):
        qv.merge_lora_then_quantize(bases["untied"], activated, tmp_path / "out")


# adapters that change the base when they are loaded


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_unconverted_initialization(bases, tmp_path, init):
    base = bases["untied"]
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    with load(base, folder) as llm:
        assert torch.equal(logits(llm.model), logits(peft_model(base, folder)))
    for knobs, text in (
        (
            {"weights": "nf4"},
            "weights='nf4': the adapter begins with a decomposition .* use weights='bf16', or save it",
        ),
        ({"weights": "int8-wo"}, "weights='int8-wo': the adapter begins"),
        ({"weights": "bf16", "streamed_layers": 1}, "streamed_layers=1: the adapter begins .* use streamed_layers=0"),
    ):
        for call in (load, qv.plan):
            with pytest.raises(qv.NotSupportedError, match=text):
                call(base, adapter=folder, **{"profile": "default", **knobs})
    with pytest.raises(qv.AdapterError, match=f"init_lora_weights is {init!r}, which changed the base before training"):
        qv.merge_lora_then_quantize(base, folder, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model and should thus not be used with other")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_conversion_that_is_advised(bases, tmp_path, init):
    """save_pretrained() makes a plain LoRA of it, which runs on whatever base, and merges."""
    from peft import LoraConfig, get_peft_model

    from tests.helpers.lora_models import load as plain

    base = bases["untied"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    model = get_peft_model(plain(base), config)
    model.peft_config["default"].init_lora_weights = True  # of the copy that training began with
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = init
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    expected = logits(model)
    folder = tmp_path / "converted"
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    with load(base, folder) as llm:
        assert torch.allclose(logits(llm.model), expected, atol=1e-3)
    load(base, folder, weights="nf4").close()
    qv.merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)
    with load(tmp_path / "out") as llm:
        assert torch.allclose(logits(llm.model), expected, atol=0.05)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
@pytest.mark.parametrize(
    *thinned(1, init=["gaussian", "orthogonal", "mica", "eva", False], weights=["nf4", "int8-wo", "fp32"])
)
def test_an_initialization_that_leaves_the_base_alone_is_not_repeated(bases, tmp_path, init, weights):
    """Every factor comes from the file, also on a base whose weights PEFT could not begin with."""
    base, settings = bases["untied"], {"target_modules": ["q_proj", "down_proj"]}
    folder = make_adapter(base, tmp_path / "adapter", **settings)
    like = Path(shutil.copytree(folder, tmp_path / "like"))
    edit_config(folder, init_lora_weights=init)
    with load(base, folder, weights=weights) as llm, load(base, like, weights=weights) as other:
        assert torch.equal(logits(llm.model), logits(other.model))


# whole modules beside quantized weights


@pytest.mark.parametrize("weights", ["nf4", "int8", "int8-wo", "fp8"])
def test_a_matrix_trained_whole_beside_quantized_ones(bases, tmp_path, weights):
    base = bases["untied"]
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["v_proj"], modules_to_save=["q_proj"])
    text = rf"weights='{weights}': the adapter brings 'model\.layers\.0\.self_attn\.q_proj\.weight' in 16 bits, which"
    for call in (load, qv.plan):
        with pytest.raises(qv.NotSupportedError, match=text + ".* use weights='bf16', or merge it"):
            call(base, adapter=folder, weights=weights, profile="default")
    if weights != "nf4":
        return
    load(base, folder, weights="bf16").close()
    qv.merge_lora_then_quantize(base, folder, tmp_path / "out", quantize="nf4", device="cpu", progress=False)
    load(tmp_path / "out", weights="nf4").close()


@pytest.mark.parametrize(
    *thinned(
        1,
        kind=["whole matrix", "whole head", "whole table", "table", "tokens of both", "biases"],
        base=["untied", "tied"],
    )
)
def test_the_smallest_plan_is_one_that_loads(bases, tmp_path, base, kind):
    """The loader refuses no plan of the search because of the adapter."""
    folder = make_adapter(bases[base], tmp_path / "adapter", **{"target_modules": ["v_proj"], **COUNTED[kind]})
    least = qv.min_vram(bases[base], adapter=folder)
    chosen = qv.plan(bases[base], vram=least, ram="8GiB", adapter=folder)
    assert not_loadable(chosen.estimate.architecture, chosen.profile) is None
    assert chosen.estimate.needed_bytes <= least


# numbers


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e5, torch.float32), (-7e4, torch.bfloat16), (1e300, torch.float64)], ids=str
)
def test_a_value_that_fp16_cannot_hold(bases, tmp_path, value, dtype):
    base = bases["untied"]
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["down_proj"])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.lora_B.weight"] = tensors[f"{LAYER}.lora_B.weight"].to(dtype)
        tensors[f"{LAYER}.lora_B.weight"][3, 0] = value

    edit_tensors(folder, spoil)
    text = rf"holds \S+ in {LAYER}\.lora_B\.weight, beyond the largest number of float16 \(65504\)"
    with pytest.raises(qv.AdapterError, match=text + ".* use weights='bf16'"):
        load(base, folder, weights="fp16")
    if value < 1e38:
        with load(base, folder, weights="bf16") as llm:
            assert torch.isfinite(logits(llm.model)).all()
    else:
        with pytest.raises(qv.AdapterError, match="beyond the largest number of bfloat16"):
            load(base, folder, weights="bf16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number(bases, tmp_path, value):
    base = bases["untied"]
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["down_proj"])
    edit_tensors(folder, lambda tensors: tensors[f"{LAYER}.lora_A.weight"][0].fill_(value))
    for call in (
        lambda: load(base, folder),
        lambda: qv.merge_lora_then_quantize(base, folder, tmp_path / "out", device="cpu", progress=False),
    ):
        with pytest.raises(
            qv.AdapterError, match=rf"holds a NaN or an infinity in {LAYER}\.lora_A\.weight; its training"
        ):
            call()


# the base's name


@pytest.mark.parametrize(
    ("trained_on", "given", "same"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "/models/Qwen2.5-7B-Instruct/", True),
        ("unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct", True),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct", True),
        ("/root/.cache/modelscope/hub/Qwen/Qwen2___5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", True),
        ("C:\\models\\Qwen3-8B", "/data/Qwen3-8B", True),
        ("Qwen/Qwen3-8B", "/hub/models--Qwen--Qwen3-8B/snapshots/0123abc", True),
        ("someone/Qwen2.5-7B-Instruct-sft-v2", "Qwen/Qwen2.5-7B-Instruct", False),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", False),
        ("Qwen/Qwen2.5-Math-7B", "/hub/models--Qwen--Qwen2.5-7B/snapshots/0123abc", False),
    ],
)
def test_names_of_the_same_base(trained_on, given, same):
    assert same_model(trained_on, given) is same


@pytest.mark.parametrize("trained_on", ["someone/untied-sft-v2", "Qwen/Qwen2.5-7B", "/root/output/sft/checkpoint-900"])
def test_an_adapter_that_names_another_base(bases, tmp_path, caplog, trained_on):
    base = bases["untied"]
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    calls = (
        lambda: load(base, folder).close(),
        lambda: qv.merge_lora_then_quantize(
            base, folder, tmp_path / "out", quantize=None, overwrite=True, device="cpu", progress=False
        ),
    )
    for name, is_said in ((trained_on, True), (str(base), False), (None, False), ("Qwen/untied-AWQ", False)):
        edit_config(folder, base_model_name_or_path=name)
        for call in calls:
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="qwen_vram"):
                call()
            assert (f"was trained on {name!r}, and the base here is {str(base)!r}" in caplog.text) is is_said


# plans


def test_a_plan_says_its_adapter(bases, tmp_path):
    base = bases["qwen3"]
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], bias="none")
    chosen = qv.plan(base, vram="8GiB", ram="8GiB", adapter=folder)
    assert f"adapter={str(folder)!r}" in chosen.call
    again = qv.Plan.from_dict(json.loads(json.dumps(chosen.to_dict())))
    assert again == chosen
    called = eval(chosen.call.replace("qv.load", "qv.plan"), {"qv": qv})
    assert called.estimate.parts() == chosen.estimate.parts()


def test_questions_about_memory_count_it(bases, tmp_path):
    base = bases["untied"]
    folder = make_adapter(base, tmp_path / "adapter", target_modules="all-linear", r=512, lora_alpha=512)
    fixed = {"profile": "default", "prompt_len": 900, "max_new_tokens": 100}
    bare, beside = (qv.min_vram(base, adapter=adapter, batch_size=40, **fixed) for adapter in (None, folder))
    assert beside > bare
    assert qv.max_batch(base, bare, adapter=folder, **fixed) < 40 <= qv.max_batch(base, bare, **fixed)
    with pytest.raises(qv.DoesNotFitError):
        qv.offload_map(base, vram=bare, ram="1KiB", batch_size=40, adapter=folder, **fixed)


def test_the_command_line_takes_an_adapter(demo):
    from typer.testing import CliRunner

    from qwen_vram.cli import app
    from qwen_vram.demo import ADAPTER

    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    question = "What is the perimeter of a rectangle of 24 by 38?"
    answer = run("chat", demo, "--adapter", ADAPTER, "-m", question, "--max-new-tokens", 64)
    assert "24 + 38 = 62, so 62 * 2 = 60 * 2 + 2 * 2 = 120 + 4 = 124" in answer
    estimate = json.loads(run("estimate", demo, "--adapter", ADAPTER, "--json"))
    assert estimate["weights"] == qv.estimate_vram(demo, adapter=ADAPTER).weights
    planned = json.loads(run("plan", demo, "--adapter", ADAPTER, "--vram", "8GiB", "--ram", "8GiB", "--json"))
    assert planned["adapter"] == str(ADAPTER)
    assert planned["limits"]["min_vram"] == qv.min_vram(demo, adapter=ADAPTER)
