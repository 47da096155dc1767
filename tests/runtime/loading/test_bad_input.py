"""Every refusal: its type, its text, and that it comes before anything is allocated or written."""

import json
import re
import shutil
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.spec.catalog import CATALOG
from qwen_vram.spec.families import model_types

SEVEN = "Qwen/Qwen2.5-7B-Instruct"
CONFIG = {**CATALOG[SEVEN].shape._asdict(), "max_position_embeddings": 32_768}


@pytest.fixture
def copy(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "checkpoint"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def nothing_may_be_loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that came after the weights began to load would fail here."""
    from transformers import AutoModelForCausalLM

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the refusal")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


def test_unknown_model():
    text = r"unknown model 'Qwen2.5-8B-Instruct'; choose from Qwen2\.5-7B-Instruct, .*; or pass a hub id"
    with pytest.raises(qv.UnknownNameError, match=text) as caught:
        qv.estimate_vram("Qwen2.5-8B-Instruct")
    assert caught.value.kind == "model"


def test_a_folder_that_is_not_there():
    with pytest.raises(
        qv.ConfigError, match=r"no checkpoint folder './nowhere'; point to the folder that holds config"
    ):
        qv.estimate_vram("./nowhere")


def test_a_model_of_a_wrong_type():
    with pytest.raises(qv.ConfigError, match="a model is a name, a folder, a config dict or an Architecture, got int"):
        qv.estimate_vram(7)


@pytest.mark.parametrize("params", [None, 0, -1, float("nan"), True, "7B"])
def test_parameters_that_are_no_number(params):
    with pytest.raises(
        qv.WorkloadError, match="model=None needs params, a positive number of parameters such as 7.62e9"
    ):
        qv.estimate_vram(None, params=params)


def test_parameters_beside_a_model():
    with pytest.raises(qv.WorkloadError, match="params is for model=None only, got both; drop one"):
        qv.estimate_vram(SEVEN, params=7e9)


def test_unknown_profile():
    with pytest.raises(
        qv.UnknownNameError, match="unknown profile 'fast'; choose from default, int4-flash, cpu-offload"
    ):
        qv.estimate_vram(SEVEN, "fast")
    with pytest.raises(qv.UnknownNameError, match="'auto' is for plan\\(\\) and load\\(\\), which know a budget"):
        qv.estimate_vram(SEVEN, "auto")


@pytest.mark.parametrize("knob", ["weights", "lm_head"])
def test_unknown_format(knob):
    with pytest.raises(
        qv.UnknownNameError, match=f"unknown {knob} in profile 'nf5'; choose from fp32, bf16, fp16, int8"
    ):
        qv.estimate_vram(SEVEN, **{knob: "nf5"})


def test_unknown_knob():
    with pytest.raises(qv.UnknownNameError, match="unknown knob 'wieghts'; choose from weights, lm_head, embeddings"):
        qv.estimate_vram(SEVEN, wieghts="nf4")


@pytest.mark.parametrize(
    ("knob", "value", "allowed"),
    [
        ("embeddings", "cpu", "device, host"),
        ("kv_cache", "fp8", "bf16, int8, int4"),
        ("kv_device", "cpu", "device, host"),
        ("cache", "sliding", "preallocated, dynamic, static, paged"),
        ("attention", "flash", "fused, sdpa, flash_attention_2, eager"),
        ("compiled", "yes", "True, False"),
        ("captured", "on", "True, False"),
    ],
)
def test_unknown_value_of_a_knob(knob, value, allowed):
    with pytest.raises(
        qv.UnknownNameError, match=f"unknown {knob} in profile '{value}'; choose from {allowed}"
    ) as caught:
        qv.estimate_vram(SEVEN, **{knob: value})
    assert caught.value.got == value
    assert ", ".join(caught.value.allowed) == allowed


def test_knobs_that_exclude_each_other():
    with pytest.raises(qv.WorkloadError, match="kv_cache='int8' needs cache='preallocated', got cache='dynamic'"):
        qv.estimate_vram(SEVEN, kv_cache="int8")
    for cache in ("dynamic", "static"):
        text = f"kv_device='host' needs cache='preallocated', got cache='{cache}'; set both"
        with pytest.raises(qv.WorkloadError, match=text) as caught:
            qv.estimate_vram(SEVEN, kv_device="host", cache=cache)
        assert (caught.value.name, caught.value.got) == ("kv_device", "host")
    for kv_cache in ("int8", "int4"):
        text = f"kv_device='host' needs kv_cache='bf16', got kv_cache='{kv_cache}'; change one of the two"
        with pytest.raises(qv.WorkloadError, match=text) as caught:
            qv.load(SEVEN, profile="int4-flash", kv_device="host", kv_cache=kv_cache)
        assert (caught.value.name, caught.value.got) == ("kv_device", "host")
    with pytest.raises(qv.WorkloadError, match="compiled=True needs a cache of fixed size, got cache='dynamic'"):
        qv.estimate_vram(SEVEN, compiled=True)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        (
            {"attention": "sdpa"},
            "compiled=True needs attention='fused', got attention='sdpa'; change one side, or begin",
        ),
        (
            {"attention": "sdpa", "embeddings": "host"},
            "needs attention='fused', embeddings='device', got attention='sdpa', embeddings='host'; change one",
        ),
        ({"kv_cache": "int8"}, "compiled=True needs kv_cache='bf16', got kv_cache='int8'"),
        ({"kv_device": "host"}, "compiled=True needs kv_device='device', got kv_device='host'"),
        ({"embeddings": "host"}, "compiled=True needs embeddings='device', got embeddings='host'"),
        ({"streamed_layers": 3}, "compiled=True needs streamed_layers=0, got streamed_layers=3"),
        ({"weights": "int8"}, "compiled=True cannot go with 'int8', whose products wait for the GPU"),
    ],
    ids=str,
)
def test_what_a_compiled_step_cannot_run_with(knobs, text):
    with pytest.raises(qv.WorkloadError, match=text) as caught:
        qv.estimate_vram(SEVEN, **{"compiled": True, "cache": "preallocated", "attention": "fused", **knobs})
    assert (caught.value.name, caught.value.got) == ("compiled", True)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        (
            {"cache": "dynamic"},
            "captured=True needs a cache of fixed size, got cache='dynamic'; set cache='static', or",
        ),
        ({"attention": "sdpa"}, "captured=True needs attention='fused', got attention='sdpa'; change one side, or"),
        ({"kv_cache": "int8", "kernels": "plain"}, "captured=True with kv_cache='int8' needs kernels='fused', got"),
        ({"kv_device": "host"}, "captured=True needs kv_device='device', got kv_device='host'"),
        ({"streamed_layers": 3, "host_layers": 1}, "captured=True needs host_layers=0, got host_layers=1"),
        ({"weights": "int8"}, "captured=True cannot go with 'int8', whose products wait for the GPU"),
        ({"lm_head": "int8"}, "captured=True cannot go with 'int8', whose products wait for the GPU"),
    ],
    ids=str,
)
def test_what_a_captured_step_cannot_run_with(knobs, text):
    base = {"captured": True, "cache": "preallocated", "attention": "fused"}
    with pytest.raises(qv.WorkloadError, match=text) as caught:
        qv.estimate_vram(SEVEN, **{**base, **knobs})
    assert (caught.value.name, caught.value.got) == ("captured", True)
    assert qv.estimate_vram(SEVEN, **base, embeddings="host").needed_bytes > 0


@pytest.mark.parametrize("value", [0, -5, 1.5, "512", True])
@pytest.mark.parametrize("name", ["prompt_len", "max_new_tokens", "batch_size"])
def test_lengths_that_are_not_positive_whole_numbers(name, value):
    with pytest.raises(qv.WorkloadError, match=f"{name} must be a positive whole number, got") as caught:
        qv.estimate_vram(SEVEN, **{name: value})
    assert (caught.value.name, caught.value.got) == (name, value)


@pytest.mark.parametrize("value", [0, -1, "512"])
def test_a_chunk_that_is_not_positive(value):
    with pytest.raises(qv.WorkloadError, match="prefill_chunk_size must be a positive number of tokens or None, got"):
        qv.estimate_vram(SEVEN, prefill_chunk_size=value)


def test_streamed_layers_out_of_range():
    with pytest.raises(qv.WorkloadError, match="streamed_layers must be a number of layers from 0, got -1"):
        qv.estimate_vram(SEVEN, streamed_layers=-1)
    with pytest.raises(qv.WorkloadError, match="streamed_layers 29 is more than the model's num_hidden_layers 28"):
        qv.estimate_vram(SEVEN, streamed_layers=29)
    with pytest.raises(qv.WorkloadError, match="layers_on_cpu must be between 0 and the model's num_hidden_layers 28"):
        qv.offload_map(SEVEN, layers_on_cpu=29)


def test_a_context_past_the_models_positions():
    text = (
        r"prompt_len 32768 \+ max_new_tokens 512 = 33280 tokens are past the model's max_position_embeddings 32768; "
        "shorten one of them, or set YaRN's rope_scaling"
    )
    for ask in (qv.estimate_vram, qv.plan, qv.offload_map, qv.load):
        extra = {"layers_on_cpu": 3, "vram": "80GiB"} if ask is qv.offload_map else {}
        model = SEVEN
        with pytest.raises(qv.WorkloadError, match=text):
            ask(model, prompt_len=32_768, **extra)


def test_a_bare_number_as_a_budget():
    for ask in (qv.plan, qv.offload_map):
        for bare in ("8", 8):
            with pytest.raises(qv.UnitError, match="vram is a bare number: got"):
                ask(SEVEN, vram=bare)
    with pytest.raises(qv.UnitError, match="ram is a bare number: got 16"):
        qv.plan(SEVEN, vram="8GiB", ram=16)
    with pytest.raises(qv.UnitError, match="budget is a bare number: got 24"):
        qv.estimate_vram(SEVEN).fits(24)


def test_a_budget_by_device():
    with pytest.raises(qv.UnitError, match="vram maps device numbers to sizes"):
        qv.plan(SEVEN, vram={"cuda:0": "8GiB"})
    with pytest.raises(qv.UnitError, match=r"vram\[0\] is a bare number: got '8'"):
        qv.plan(SEVEN, vram={0: "8"})
    for device in (-1, True):
        with pytest.raises(qv.UnitError, match="vram maps device numbers to sizes"):
            qv.plan(SEVEN, vram={device: "8GiB"})


def test_an_unknown_preference():
    with pytest.raises(qv.UnknownNameError, match="unknown prefer 'size'; choose from quality, speed, memory"):
        qv.plan(SEVEN, vram="8GiB", prefer="size")


def test_a_budget_nothing_fits_says_what_would():
    text = (
        r"Qwen/Qwen2.5-7B-Instruct with nf4 weights at 32000 \+ 512 tokens, batch 4, needs \d+\.\d\d GiB on the GPU, "
        r"CUDA context included; 5\.00 GiB are allowed; prompt_len=\d+ with max_new_tokens=512 and batch_size=4 "
        "would fit"
    )
    with pytest.raises(qv.DoesNotFitError, match=text) as caught:
        qv.plan(SEVEN, vram="5GiB", prompt_len=32_000, batch_size=4, streamed_layers=0)
    error = caught.value
    assert error.budget_bytes == 5 * 2**30 < error.needed_bytes == error.estimate.needed_bytes
    near = error.nearest
    fits = {"max_new_tokens": near.max_new_tokens, "batch_size": near.batch_size, "vram": "5GiB"}
    assert qv.plan(SEVEN, profile=error.estimate.profile, prompt_len=near.prompt_len, **fits)
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(SEVEN, profile=error.estimate.profile, prompt_len=near.prompt_len + 1, **fits)


def test_a_budget_not_even_one_token_fits():
    with pytest.raises(
        qv.DoesNotFitError,
        match="not even one token would fit; offer more, set fewer knobs yourself, or use a smaller model",
    ) as caught:
        qv.plan(SEVEN, vram="1GiB")
    assert caught.value.nearest is None
    with pytest.raises(qv.DoesNotFitError, match="GiB of host memory; 2.00 GiB are allowed") as caught:
        qv.plan(SEVEN, vram="4GiB", ram="2GiB", weights="bf16", disk_layers=0)
    assert caught.value.needed_bytes == caught.value.estimate.host
    with pytest.raises(qv.DoesNotFitError, match="of host memory; 1.00 GiB are allowed"):
        qv.plan(SEVEN, vram={}, ram="1GiB")


def test_a_map_that_no_offload_makes_fit():
    with pytest.raises(
        qv.DoesNotFitError, match="with 28 of 28 layers on the host needs .* GPU, CUDA .*; 2.00 GiB are"
    ):
        qv.offload_map(SEVEN, vram="2GiB", ram="64GiB")


# config.json


def test_no_config(tmp_path):
    with pytest.raises(qv.ConfigError, match=r"no config\.json in .*; point to the folder that holds config\.json"):
        qv.estimate_vram(tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"model_type": "qwen2", "hidden_size": 35', "is cut off"),
        ("", "is cut off"),
        ("hidden_size: 3584\nmodel_type: qwen2", "is not JSON"),
        ("[1, 2]", "holds a JSON list, not an object"),
    ],
)
def test_a_config_that_is_no_json_object(tmp_path, text, what):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(qv.ConfigError, match=what) as caught:
        qv.load(tmp_path)
    assert caught.value.source.endswith("config.json")


def test_a_config_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(qv.ConfigError, match="is text in UTF-16, as some Windows editors save it; save it as UTF-8"):
        qv.estimate_vram(tmp_path)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2_moe", "qwen3_moe", "qwen2_vl", "a.b", "", 7, ["qwen2"], None])
def test_another_architecture(model_type):
    *most, last = model_types()
    assert set(most) >= {"qwen2"}
    text = f"model_type {model_type!r} is not supported; dense {', '.join(most)} and {last} are ("
    with pytest.raises(qv.ConfigError, match=re.escape(text)):
        qv.estimate_vram({**CONFIG, "model_type": model_type})


@pytest.mark.parametrize("value", [0, -1, 3584.0, "3584", True, 10**9])
def test_impossible_sizes(value):
    with pytest.raises(qv.ConfigError, match="hidden_size must be a positive integer of at most 10000000, got"):
        qv.estimate_vram({**CONFIG, "hidden_size": value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_key_value_heads": 5}, "num_attention_heads 28 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": None, "hidden_size": 3585}, "hidden_size 3585 is not a multiple of num_attention_heads 28"),
        ({"head_dim": 127}, "head_dim 127 is odd; rotary embeddings need an even one"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"use_sliding_window": True}, "sliding-window attention is switched on, which this library does not count"),
        ({"layer_types": ["sliding_attention"]}, "sliding-window attention is switched on"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "already quantized by 'gptq', which is not counted",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "load_in_4bit and load_in_8bit are neither true in quantization_config; set the one that the",
        ),
    ],
)
def test_a_config_that_does_not_add_up(change, text):
    with pytest.raises(qv.ConfigError, match=text):
        qv.estimate_vram({**CONFIG, **change})


# checkpoints


def test_no_safetensors(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        qv.CheckpointError, match=r"no safetensors in .*; model\.safetensors or model\.safetensors\.index"
    ):
        qv.load(copy)


def test_only_pickles(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    text = (
        r"holds only pickle files \(pytorch_model\.bin\), which can run code .*; only safetensors are read\..*python -c"
    )
    with pytest.raises(qv.CheckpointError, match=text):
        qv.load(copy)


def test_a_missing_shard(shards):
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(qv.CheckpointError, match=f"shard '{victim.name}' is missing from .*; download") as caught:
        qv.load(shards)
    assert caught.value.path == str(victim)


def test_a_shard_that_is_cut_off(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        qv.CheckpointError, match=r"shard 'model\.safetensors' is cut off: \d+ bytes on disk, \d+ in its"
    ):
        qv.load(copy)


def test_a_shard_that_is_too_long(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    with pytest.raises(qv.CheckpointError, match="is too long"):
        qv.load(copy)


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\0" * 8, b""])
def test_a_shard_whose_header_length_is_damaged(copy, damage):
    file = copy / "model.safetensors"
    file.write_bytes(damage + file.read_bytes()[8:] if damage else b"")
    with pytest.raises(qv.CheckpointError, match=r"shard 'model\.safetensors' is corrupt: .*; download the file again"):
        qv.load(copy)


def rewrite_header(file: Path, change) -> None:
    """Apply `change` to a safetensors file's header, keeping its data."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda h: h["model.norm.weight"].update(shape=[255]),
            r"'model\.norm\.weight' of shape \[255\] takes 512 bytes",
        ),
        (lambda h: h["model.norm.weight"].update(dtype="BF17"), "KeyError in its header"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 512]), "its tensors overlap or leave a hole"),
        (lambda h: h.pop("model.layers.1.mlp.up_proj.weight"), "its tensors overlap or leave a hole"),
        (lambda h: h["model.norm.weight"].pop("shape"), "KeyError in its header"),
    ],
)
def test_a_shard_whose_header_does_not_add_up(copy, change, text):
    rewrite_header(copy / "model.safetensors", change)
    with pytest.raises(qv.CheckpointError, match=text):
        qv.load(copy)


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b.safetensors"]
)
def test_an_index_that_points_outside_its_folder(shards, outside):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = outside
    index.write_text(json.dumps(content))
    with pytest.raises(
        qv.CheckpointError, match="points outside its folder: .*; every shard must be a plain file name"
    ):
        qv.load(shards)


def test_an_index_that_names_the_wrong_shard(shards):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.no_such.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(
        qv.CheckpointError, match=r"says that 'model\.no_such\.weight' is in .*, which does not hold it"
    ):
        qv.load(shards)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none(shards, text):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(qv.CheckpointError, match="is not a safetensors index with a weight_map"):
        qv.load(shards)


def test_weights_of_another_model(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(qv.CheckpointError, match=r"has shape \[768, 256\] .* config\.json says \[512, 256\]"):
        qv.load(copy)


def test_a_tensor_that_is_not_there(copy):
    config = json.loads((copy / "config.json").read_text())
    layers = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (copy / "config.json").write_text(json.dumps({**config, **layers}))
    with pytest.raises(qv.CheckpointError, match=r"lacks model\.layers\.3\.self_attn\.q_proj\.weight, .* and \d+ more"):
        qv.load(copy)


def test_a_tensor_of_a_dtype_that_is_no_float(copy):
    def as_integers(header):
        header["model.norm.weight"].update(dtype="I16")

    rewrite_header(copy / "model.safetensors", as_integers)
    with pytest.raises(qv.CheckpointError, match=r"'model\.norm\.weight' is stored as I16; BF16, F16, F32 are read"):
        qv.load(copy)


def test_a_model_without_weights():
    with pytest.raises(qv.ConfigError, match=r"load\(\) needs weights: .*, got a dict"):
        qv.load({**CONFIG, "num_hidden_layers": 1, "vocab_size": 64}, ram="64GiB", profile="default")


# this machine


def test_bitsandbytes_missing(untied, monkeypatch):
    import qwen_vram.runtime.backends.bnb as bnb

    monkeypatch.setattr(bnb, "find_spec", lambda name: None)
    text = r'weights=\'nf4\' needs bitsandbytes, which is not installed; run: pip install "bitsandbytes>=0\.50"'
    with pytest.raises(qv.BackendUnavailableError, match=text) as caught:
        qv.load(untied, profile="default", weights="nf4")
    assert caught.value.backend == "bnb"
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    ("asked", "shown"), [({"vram": "8GiB"}, "vram='8GiB'"), ({"device": "cuda"}, "device='cuda'")], ids=str
)
def test_no_gpu_where_one_was_asked_for(untied, monkeypatch, asked, shown):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(qv.BackendUnavailableError, match=f"{shown} asks for a GPU, and torch sees none here"):
        qv.load(untied, **asked)


def test_an_unknown_device(untied):
    with pytest.raises(qv.UnknownNameError, match="unknown device 'tpu'; choose from cuda, cpu"):
        qv.load(untied, device="tpu")


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        (
            {"compiled": True, "cache": "static", "attention": "fused"},
            "compiled=True runs on a GPU, .* use compiled=False",
        ),
        (
            {"captured": True, "cache": "preallocated", "attention": "fused"},
            "captured=True runs on a GPU, .* use captured=False",
        ),
        ({"lm_head": "nf4"}, "lm_head='nf4' with weights='bf16'"),
        (
            {"weights": "nf4", "lm_head": "int8"},
            "lm_head='int8' with weights='nf4': a model is quantized to one format",
        ),
    ],
    ids=str,
)
def test_a_knob_that_is_counted_and_cannot_be_loaded_is_refused_by_name(untied, knobs, text):
    with pytest.raises(qv.NotSupportedError, match=text) as caught:
        qv.load(untied, profile="default", **knobs)
    assert caught.value.knob in knobs


def test_flash_attention_2_says_why_not(untied):
    with pytest.raises(qv.BackendUnavailableError, match="attention='flash_attention_2' needs"):
        qv.load(untied, profile="default", attention="flash_attention_2")


def test_huggingface_hub_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(qv.BackendUnavailableError, match="reading from the hub needs huggingface_hub, which is not"):
        qv.estimate_vram("someone/some-model")


def test_matplotlib_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        qv.BackendUnavailableError, match=r'plot\(\) needs matplotlib, .* run: pip install "qwen-vram\[plot\]"'
    ):
        qv.estimate_vram(SEVEN).plot()


def test_an_empty_prompt_or_message(untied, monkeypatch):
    monkeypatch.undo()
    with qv.load(untied, profile="default", progress=False) as llm:
        for prompt in ("", [], ["a", ""], 3):
            with pytest.raises(qv.WorkloadError, match="prompt must be a text, or a list of texts, none empty"):
                llm.generate(prompt)
        for message in ([], [{"text": "hi"}]):
            with pytest.raises(qv.WorkloadError, match="message must be a text, or a list of"):
                llm.chat(message)


@pytest.mark.parametrize("profile", [None, 3, b"default", ["default"], Path("default")], ids=repr)
def test_a_profile_that_is_none(profile):
    for call in (qv.estimate_vram, lambda model, profile: qv.plan(model, profile=profile, vram={})):
        with pytest.raises(qv.UnknownNameError, match="unknown profile .*; choose from default, .*; or pass a Profile"):
            call(SEVEN, profile=profile)


def test_a_name_that_is_too_long_for_a_file():
    with pytest.raises(qv.UnknownNameError, match="unknown model"):
        qv.estimate_vram("q" * 300)


@pytest.mark.parametrize("adapter", [True, 0, b"folder", []], ids=repr)
def test_an_adapter_that_is_no_name(adapter):
    with pytest.raises(qv.CheckpointError, match="an adapter is a folder or a hub id, got"):
        qv.estimate_vram(SEVEN, adapter=adapter)


@pytest.mark.parametrize("size", ["\u0663GiB", "8\nGiB", "\uff18GiB"])
def test_sizes_are_in_plain_digits(size):
    with pytest.raises(qv.UnitError, match="vram is not a size"):
        qv.plan(SEVEN, vram=size)


def test_a_format_that_nobody_saves(untied, tmp_path):
    from qwen_vram.runtime.saving.save import check_output

    text = "unknown format to save 'nope'; choose from int8, nf4, nf4-plain, fp4, fp4-plain, int4, int8-wo, fp8"
    with pytest.raises(qv.UnknownNameError, match=f"{text}$"):
        check_output(tmp_path / "out", str(untied), weights="nope", max_shard_size="4GB", overwrite=False)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_config_that_says_quantized_over_plain_weights(copy, method):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(qv.CheckpointError, match=rf"says that {method} quantized .* take quantization_config out"):
        qv.load(copy)
