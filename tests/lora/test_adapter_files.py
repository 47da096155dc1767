"""Adapters as trainers leave them: one reader for every call, PEFT's answers, or one refusal with advice that helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import qwen_vram as qv
from tests.conftest import make_checkpoint
from tests.helpers.lora_models import edit_config, edit_tensors, logits, make_adapter, peft_model

PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", **SHAPE)


KINDS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
}


@pytest.fixture(scope="module")
def made(base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return {kind: make_adapter(base, root / kind.replace(" ", "-"), **settings) for kind, settings in KINDS.items()}


@pytest.fixture
def adapter(made, tmp_path) -> Callable[..., Path]:
    """A copy of an adapter of some kind, to be changed."""
    return lambda kind="plain", name="adapter": Path(shutil.copytree(made[kind], tmp_path / name))


def load(model: object, adapter: object = None, **knobs: Any) -> qv.LoadedModel:
    return qv.load(model, adapter=adapter, **{"profile": "default", "weights": "fp32", "progress": False, **knobs})


def merge(base: object, adapter: object, out: Path) -> qv.MergeReport:
    return qv.merge_lora_then_quantize(base, adapter, out, quantize=None, device="cpu", progress=False)


def calls(base: object, adapter: object, tmp_path: Path) -> dict[str, Callable[[], object]]:
    return {
        "estimate": lambda: qv.estimate_vram(base, adapter=adapter),
        "plan": lambda: qv.plan(base, adapter=adapter, vram="8GiB"),
        "max_context": lambda: qv.max_context(base, "8GiB", adapter=adapter),
        "max_batch": lambda: qv.max_batch(base, "8GiB", adapter=adapter),
        "min_vram": lambda: qv.min_vram(base, adapter=adapter),
        "offload_map": lambda: qv.offload_map(base, adapter=adapter, layers_on_cpu=1),
        "load": lambda: load(base, adapter),
        "merge": lambda: merge(base, adapter, tmp_path / "out"),
    }


def refused(base: object, adapter: object, tmp_path: Path, text: str, error: type[Exception] = qv.AdapterError):
    """The one refusal of every call, after which nothing was written."""
    said = set()
    for name, call in calls(base, adapter, tmp_path).items():
        with pytest.raises(error, match=text) as caught:
            call()
        said.add(str(caught.value))
        assert not (tmp_path / "out").exists(), name
    assert len(said) == 1
    return caught.value


def runs_as_peft(base: Path, adapter: Path, tmp_path: Path, *, like: Path | None = None) -> None:
    """Beside its base and merged, the adapter gives PEFT's logits, or those of `like` under PEFT."""
    expected = logits(peft_model(base, like or adapter))
    with load(base, adapter) as llm:
        assert torch.equal(logits(llm.model), expected)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
    merge(base, adapter, tmp_path / "out")
    with load(tmp_path / "out") as llm:
        assert torch.allclose(logits(llm.model), expected, atol=0.05)


# folders


@pytest.mark.parametrize("name", ["plain", "dora", "tokens"])
def test_an_adapter_given_as_the_model(base, adapter, made, tmp_path, name):
    folder = adapter(name)
    text = f"holds an adapter of the base {str(base)!r}, and not a whole model; pass the base as the model"
    for call in calls(folder, made["plain"], tmp_path).values():
        with pytest.raises(qv.AdapterError, match=text) as caught:
            call()
    advice = str(caught.value)
    assert f"qv.load({str(base)!r}, adapter={str(folder)!r})" in advice
    assert f"qv.merge_lora_then_quantize({str(base)!r}, {str(folder)!r}, out)" in advice
    if name != "dora":
        load(base, folder).close()
    merge(base, folder, tmp_path / "out")


@pytest.mark.parametrize("subfolders", [["default"], ["checkpoint-100"], ["checkpoint-500", "checkpoint-1000", "runs"]])
def test_a_trainers_output_folder(base, made, tmp_path, subfolders):
    run = tmp_path / "run"
    for name in subfolders:
        shutil.copytree(made["plain"], run / name)
    if "runs" in subfolders:
        (run / "runs" / "adapter_config.json").unlink()
    last = run / {1: subfolders[0], 3: "checkpoint-1000"}[len(subfolders)]
    error = refused(base, run, tmp_path, f"adapters in its subfolders.*{subfolders[0]}.*; pass one of them, such as")
    assert str(last) in str(error)
    merge(base, last, tmp_path / "out")
    for call in (lambda: load(run), lambda: qv.estimate_vram(run), lambda: merge(run, last, tmp_path / "two")):
        with pytest.raises(qv.AdapterError, match="holds no model, and adapters of the base .* in its subfolders"):
            call()


def test_more_checkpoints_than_are_listed(base, made, tmp_path):
    for step in range(100, 1100, 100):
        shutil.copytree(made["plain"], tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(qv.AdapterError, match="5 before, checkpoint-600, .*, checkpoint-1000"):
        qv.estimate_vram(base, adapter=tmp_path / "run")


def test_a_whole_model_given_as_the_adapter(base, made, tmp_path):
    merge(base, made["plain"], tmp_path / "merged")
    for model in (base, tmp_path / "merged", qv.demo.CHECKPOINT if hasattr(qv, "demo") else base):
        text = "holds a whole model and not an adapter: if the adapter is merged into it already, pass the folder as"
        refused(base, model, tmp_path, text)
    with load(tmp_path / "merged") as llm:
        assert torch.isfinite(logits(llm.model)).all()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_given_as_the_adapter(base, made, tmp_path, file):
    path = made["plain"] / file
    error = refused(base, path, tmp_path, "is a file, and an adapter is a folder with adapter_config.json and")
    assert f"pass the folder {str(made['plain'])!r}" in str(error)


def test_a_home_folder_is_expanded(base, made, monkeypatch):
    monkeypatch.setenv("HOME", str(made["plain"].parent))
    assert qv.estimate_vram(base, adapter="~/plain") == qv.estimate_vram(base, adapter=made["plain"])


def test_a_base_with_its_adapter_in_one_folder_still_merges(base, made, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "both"))
    shutil.copytree(made["plain"], folder, dirs_exist_ok=True)
    merge(folder, folder, tmp_path / "one")
    merge(base, made["plain"], tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "one" / "adapter_model.safetensors").exists()


# settings


@pytest.mark.parametrize("left", [(), ("architectures",), ("model_type", "architectures")], ids=str)
def test_an_adapter_config_that_is_the_models(base, adapter, tmp_path, left):
    folder = adapter()
    own = (folder / "adapter_config.json").read_text()
    config = json.loads((base / "config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({key: config[key] for key in config if key not in left}))
    error = refused(
        base, folder, tmp_path, r"this is a model's config\.json, not an adapter's \(it holds .*hidden_size"
    )
    assert error.path == str(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(own)
    runs_as_peft(base, folder, tmp_path)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    "fields",
    [
        {"lorap_emb_lr": 1e-06, "lorap_lr_ratio": 16.0, "lora_dtype": None, "use_qa_lora": False},
        {"swift_type": "LORA", "lora_dtype": "AUTO", "model_key_mapping": {"model": "model.layers"}},
        {"enable_lora": None, "merge_weights": True},
        {"loraplus_lr_ratio": 16.0, "unsloth_fixed": True, "trainer_state": {"epoch": 3}},
        {"training_dataset": "alpaca", "seed": 42, "_name_or_path": "someone/adapter"},
    ],
    ids=str,
)
def test_fields_about_training_have_no_effect(base, adapter, made, tmp_path, fields):
    folder = adapter()
    edit_config(folder, **fields)
    runs_as_peft(base, folder, tmp_path, like=made["plain"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kasa_config": {"beta": 1e-4}}, r"q_proj\.lora_diag is missing"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora does not name .*q_proj, and its match_strict is true"),
        ({"use_bdlora": True}, "use_bdlora must be an object with nblocks, got True"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks must be a positive number, got 0"),
        ({"target_parameters": ["embed_tokens.weight"]}, r"embed_tokens\.lora_A\.weight is missing"),
        ({"layer_replication": [[0, 9]]}, r"layer_replication is \[\[0, 9\]\], and the base .* has . layers"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changed the base before training"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed the base"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    ],
    ids=str,
)
def test_fields_that_change_the_arithmetic(base, adapter, tmp_path, fields, text):
    folder = adapter()
    edit_config(folder, **fields)
    for name, call in calls(base, folder, tmp_path).items():
        only_beside = {"kasa_config", "target_parameters", "layer_replication"} & set(fields)
        merged = name == "merge" and (only_beside or fields.get("use_bdlora") == {"nblocks": 2})
        with pytest.raises(qv.AdapterError, match="so it cannot be merged exactly" if merged else text):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"use_qa_lora": True}, "use_qa_lora is set: QA-LoRA groups the inputs"),
        ({"use_qalora": True}, "use_qalora is set: QALoRA groups the inputs"),
        ({"use_merged_linear": True, "enable_lora": [True]}, "use_merged_linear is set: several projections share"),
        ({"enable_lora": [True, False]}, "enable_lora is set: several projections share"),
    ],
    ids=str,
)
def test_fields_that_peft_does_not_follow(base, adapter, made, tmp_path, fields, text):
    """Tensors of a plain LoRA's shapes are one to PEFT, which `load()` runs; the merge does not guess."""
    folder = adapter()
    edit_config(folder, **fields)
    with load(base, folder) as llm:
        assert torch.equal(logits(llm.model), logits(peft_model(base, made["plain"])))
    with pytest.raises(qv.AdapterError, match=text + ".*, so it cannot be merged exactly; merge it with PEFT itself"):
        merge(base, folder, tmp_path / "out")


def test_a_field_that_nobody_knows(base, adapter, tmp_path):
    """PEFT runs it, with a warning of its own; the merge does not guess, and its advice is one that can be followed."""
    folder = adapter()
    edit_config(folder, use_next_lora=True)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'use_next_lora'"):
        load(base, folder).close()
    with pytest.raises(
        qv.AdapterError, match="use_next_lora is set, .*remove the key from the file if it has no effect"
    ):
        merge(base, folder, tmp_path / "out")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "use_next_lora"}))
    runs_as_peft(base, folder, tmp_path)


# keys


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], None]:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        items = [(change(key), tensor) for key, tensor in tensors.items()]
        tensors.clear()
        tensors.update(items)

    return rename


def in_memory(key: str) -> str:
    """The key that PEFT's model has in memory, with the adapter's name in it."""
    if key.endswith((".lora_embedding_A", ".lora_embedding_B", "trainable_tokens_delta", "lora_magnitude_vector")):
        return f"{key}.default"
    if ".lora_" in key:
        return key.replace(".weight", ".default.weight")
    return key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


@pytest.mark.parametrize("kind", ["plain", "whole head", "tables", "tokens"])
def test_keys_with_the_adapters_name(base, adapter, made, tmp_path, kind):
    folder = adapter(kind)
    edit_tensors(folder, renamed(in_memory))
    runs_as_peft(base, folder, tmp_path, like=made[kind])


@pytest.mark.parametrize("wrapped", ["modules_to_save.", "modules_to_save.default."])
def test_a_whole_module_with_its_wrappers_name(base, adapter, made, tmp_path, wrapped):
    folder = adapter("whole head")
    edit_tensors(folder, renamed(lambda key: key.replace("lm_head.weight", f"lm_head.{wrapped}weight")))
    runs_as_peft(base, folder, tmp_path, like=made["whole head"])


def test_dora_with_the_adapters_name(base, adapter, made, tmp_path):
    folder = adapter("dora")
    edit_tensors(folder, renamed(in_memory))
    merge(base, folder, tmp_path / "one")
    merge(base, made["dora"], tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.removeprefix(PREFIX),
        lambda key: key.removeprefix("base_model."),
        lambda key: f"module.{key}",
        lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}_orig_mod.model."),
        lambda key: key.replace(".lora_A.", ".lora_A.default.default."),
        lambda key: key.replace(".lora_B.", ".lora_B.sft."),
        lambda key: key.replace(".lora_A.weight", ".lora_down.weight"),
    ],
    ids=["no prefix", "half a prefix", "DDP", "torch.compile", "the name twice", "another name", "another library"],
)
def test_keys_that_peft_would_leave_out(base, adapter, tmp_path, change):
    folder = adapter()
    edit_tensors(folder, renamed(change))
    error = refused(base, folder, tmp_path, "holds keys that are not PEFT's: .* rename them, or save the adapter again")
    assert error.path == str(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(".layers.0.", ".layers.7."),
        lambda key: key.replace("self_attn", "attention"),
        lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
    ],
    ids=["another layer", "another architecture", "a nested model"],
)
def test_keys_of_modules_that_the_base_has_not(base, adapter, tmp_path, change):
    folder = adapter()
    edit_tensors(folder, renamed(change))
    refused(
        base, folder, tmp_path, "does not fit the base 'base': .* is not in it.*; pass the base that it was trained"
    )


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_adapters_of_models_that_are_no_language_models(base, adapter, tmp_path, task_type):
    folder = adapter()
    edit_config(folder, task_type=task_type, modules_to_save=["classifier", "score"])
    edit_tensors(folder, lambda tensors: tensors.update({f"{PREFIX}score.weight": torch.zeros(2, 64)}))
    text = f"score is not in it; its task_type is '{task_type}', so that it belongs to another kind of model than"
    refused(base, folder, tmp_path, text)


# tensors against settings


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["down_proj"]},
        {"layers_to_transform": [0, 1]},
        {"target_modules": r".*\.self_attn\.q_proj"},
    ],
    ids=str,
)
def test_tensors_of_modules_that_the_settings_do_not_name(base, adapter, made, tmp_path, settings):
    """PEFT leaves them out without a word, and a merge that took them would give something else."""
    folder = adapter()
    named = json.loads((folder / "adapter_config.json").read_text())
    edit_config(folder, **settings)
    text = "is not what its adapter_config.json says: .* is there, and target_modules does not name model.layers"
    error = refused(base, folder, tmp_path, text)
    assert "if these modules were trained, name them in target_modules" in str(error)
    edit_config(folder, **{key: named[key] for key in settings})
    runs_as_peft(base, folder, tmp_path, like=made["plain"])


@pytest.mark.parametrize(
    "lost",
    [
        lambda key: ".layers.2." in key,
        lambda key: "down_proj" in key,
        lambda key: ".layers.1.self_attn.q_proj.lora_B" in key,
    ],
    ids=["a layer", "a module", "a factor"],
)
def test_a_file_that_lacks_tensors(base, adapter, made, tmp_path, lost):
    folder = adapter()
    edit_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if lost(key)])
    error = refused(base, folder, tmp_path, "is not what its adapter_config.json says: .*(is missing|only one of its)")
    assert "copy the whole file from the training run again" in str(error)
    shutil.copy(made["plain"] / "adapter_model.safetensors", folder)
    runs_as_peft(base, folder, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": ["model.layers.2.self_attn.q_proj"]},
        {"target_modules": r"model\.layers\.[01]\..*(q|down)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.1.mlp.up_proj", "lm_head"]},
    ],
    ids=str,
)
def test_settings_that_name_some_layers(base, tmp_path, settings):
    """The tensors that PEFT saved for them are whole."""
    folder = make_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **settings})
    runs_as_peft(base, folder, tmp_path)


def test_all_linear_as_a_trainer_writes_it(base, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    edit_config(folder, target_modules="all-linear")
    runs_as_peft(base, folder, tmp_path)


def test_settings_that_name_no_module(base, adapter, made, tmp_path):
    """The tensors say it: PEFT alone would adapt its own default, and leave the others out."""
    folder = adapter()
    edit_config(folder, target_modules=None)
    runs_as_peft(base, folder, tmp_path, like=made["plain"])


@pytest.mark.parametrize("kind", ["every tensor", "one factor", "a whole module"])
def test_empty_tensors(base, adapter, tmp_path, kind):
    folder = adapter("whole head")
    key = {"every tensor": "", "one factor": "layers.1.self_attn.q_proj.lora_A", "a whole module": "lm_head"}[kind]
    shape = (0, 64) if kind == "one factor" else (0,)
    edit_tensors(folder, lambda tensors: tensors.update({k: torch.zeros(shape) for k in tensors if key in k}))
    refused(base, folder, tmp_path, r"holds empty tensors: .* \[0.*so it holds no weights; DeepSpeed ZeRO-3 saves")


def test_no_tensor_at_all(base, adapter, tmp_path):
    folder = adapter()
    edit_tensors(folder, lambda tensors: tensors.clear())
    refused(base, folder, tmp_path, "holds no tensors, so it holds no weights; .*stage3_gather_16bit_weights_on_model")


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_without_its_flag(base, adapter, made, tmp_path, spelling):
    folder = adapter("dora")
    edit_tensors(folder, renamed(lambda key: key.replace("lora_magnitude_vector", spelling)))
    edit_config(folder, use_dora=False)
    refused(base, folder, tmp_path, "magnitude_vector.* is there, and use_dora is false; if .* set use_dora to true in")
    edit_config(folder, use_dora=True)
    merge(base, folder, tmp_path / "one")
    merge(base, made["dora"], tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_dtype_of_an_adapter(base, adapter, tmp_path, dtype):
    folder = adapter()
    edit_tensors(folder, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    like = adapter(name="like")
    edit_tensors(like, lambda tensors: tensors.update({k: v.to(dtype).float() for k, v in tensors.items()}))
    runs_as_peft(base, folder, tmp_path, like=like)


def test_whole_numbers_are_no_adapter(base, adapter, tmp_path):
    folder = adapter()
    edit_tensors(folder, lambda tensors: tensors.update({key: value.int() for key, value in tensors.items()}))
    refused(base, folder, tmp_path, r"holds keys that are not PEFT's: .*\(I32 \[")
