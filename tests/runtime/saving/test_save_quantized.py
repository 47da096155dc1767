"""Quantized models saved and loaded again, bit for bit: by `load` with no knob, and by plain transformers."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_vram as qv
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.measure import weight_storages
from tests.helpers.command import qwen_vram
from tests.helpers.forked import Forked
from tests.helpers.lora_models import assert_same, stored
from tests.helpers.tiers import thinned

QUANTIZED = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8", "int4", "int8-wo", "fp8")
INPUTS = {"input_ids": torch.arange(3, 40)[None]}
# Model, and whether its head is quantized: a tied one into a tensor of its own.
HEADS = [("demo", False), ("demo", True), ("tied", True)]


def load(model, **knobs):
    return qv.load(model, profile=knobs.pop("profile", "default"), progress=False, **knobs)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: tensor.to(model.device) for name, tensor in INPUTS.items()}).logits


def tensors(model) -> dict[str, torch.Tensor]:
    """Every tensor of a model's checkpoint, copied: a forward on the CPU repacks 4-bit weights in place."""
    return {name: tensor.clone().cpu() for name, tensor in model.state_dict().items()}


def tied_twins(found: dict[str, torch.Tensor], folder) -> dict[str, torch.Tensor]:
    """A model's tensors without the head that is the embedding's."""
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return {name: tensor for name, tensor in found.items() if not (tied and name == "lm_head.weight")}


# Whether the head is quantized, and where the embeddings are.
TABLES = [(False, "device"), (True, "device"), (False, "host"), (True, "host")]


@pytest.mark.parametrize(*thinned(1, weights=QUANTIZED, model=("demo", "tied", "qwen3"), tables=TABLES))
def test_it_loads_again_bit_for_bit_with_no_knob(request, tmp_path, model, weights, tables):
    head, embeddings = tables
    out = tmp_path / "out"
    lm_head = weights if head else None
    with load(request.getfixturevalue(model), weights=weights, lm_head=lm_head, embeddings=embeddings) as llm:
        before = tensors(llm.model)
        report = llm.save_quantized(out, progress=False)
        expected, promised = logits(llm.model), llm.plan.estimate.weights + llm.plan.estimate.host
    assert_same(stored(out), tied_twins(before, out))
    assert report.total_bytes == sum(tensor.nbytes for tensor in stored(out).values())
    with qv.load(out, progress=False) as again:
        assert (again.plan.profile.weights, again.plan.profile.lm_head) == (weights, lm_head)
        assert_same(tensors(again.model), before)
        real = weight_storages(again.model, get_backend(weights))
        assert sum(real.values()) == again.plan.estimate.weights == promised
        assert torch.equal(logits(again.model), expected)


@pytest.mark.parametrize(*thinned(1, weights=QUANTIZED, case=HEADS))
def test_plain_transformers_load_it(request, tmp_path, weights, case):
    model, head = case
    knobs = {"weights": weights, "lm_head": weights if head else None, "embeddings": "host"}
    with load(request.getfixturevalue(model), **knobs) as llm:
        llm.save_quantized(tmp_path / "out", progress=False)
        before, expected = tensors(llm.model), logits(llm.model)
        prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype is torch.bfloat16
    assert_same(tensors(plain), before)
    assert torch.equal(logits(plain), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == prompt


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(weights, marks=[pytest.mark.full] if weights in ("nf4-plain", "fp4", "int8-wo") else [])
        for weights in QUANTIZED
    ],
)
def test_a_model_that_has_run_is_saved_as_it_was_loaded(untied, tmp_path, weights):
    """bitsandbytes' own `state_dict()` gives other scales after a CPU forward."""
    with load(untied, weights=weights, lm_head=weights) as llm:
        llm.save_quantized(tmp_path / "fresh", progress=False)
        for out in ("once", "twice"):
            llm.generate("hello", max_new_tokens=2, do_sample=False)
            expected = logits(llm.model)
            llm.save_quantized(tmp_path / out, progress=False)
            assert_same(stored(tmp_path / out), stored(tmp_path / "fresh"))
            assert torch.equal(logits(llm.model), expected)
        llm.model.save_pretrained(tmp_path / "plain")
    assert_same(stored(tmp_path / "plain"), stored(tmp_path / "fresh"))
    with qv.load(tmp_path / "once", progress=False) as again:
        again.generate("hello", max_new_tokens=2, do_sample=False)
        again.save_quantized(tmp_path / "copy", progress=False)
    assert_same(stored(tmp_path / "copy"), stored(tmp_path / "fresh"))


def test_weights_quantized_anew_and_run_are_refused(demo, tmp_path):
    import bitsandbytes

    with load(demo, weights="nf4") as llm:
        module = llm.model.model.layers[1].mlp.up_proj
        if not module.support_avx512bf16_for_cpu:
            pytest.skip("this CPU does not repack weights")
        anew = bitsandbytes.nn.Params4bit(torch.randn(768, 256).bfloat16(), requires_grad=False, quant_type="nf4")
        module.weight = anew.to("cpu")
        llm.save_quantized(tmp_path / "before", progress=False)
        logits(llm.model)
        text = r"'model\.layers\.1\.mlp\.up_proj' was quantized anew after it was loaded, and has run on the CPU since"
        with pytest.raises(qv.NotSupportedError, match=text):
            llm.save_quantized(tmp_path / "out", progress=False)
        llm.model.state_dict()
        with pytest.raises(qv.NotSupportedError, match=text):
            llm.save_quantized(tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before"]


SAVERS = [
    {"embeddings": "host"},
    {"cache": "preallocated", "kv_cache": "int8"},
    {"cache": "preallocated", "kv_cache": "int4", "prefill_chunk_size": 8},
    {"cache": "preallocated", "kv_device": "host"},
    {"profile": "compact"},
]


@pytest.fixture(scope="module")
def compact(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("compact") / "out"
    with load(demo, profile="compact") as llm:
        llm.save_quantized(out, progress=False)
    return out


@pytest.mark.parametrize("knobs", SAVERS, ids=str)
def test_the_savers_work_on_the_copy_as_on_the_original(demo, compact, knobs):
    answers = []
    for model in (demo, compact):
        with load(model, **{"weights": "nf4", "lm_head": "nf4", **knobs}) as llm:
            answers.append(llm.chat("What is 12 + 30?", max_new_tokens=4, do_sample=False))
            assert llm.report().measured["kv_cache"] == pytest.approx(llm.report().estimate.kv_cache, rel=0.1)
    assert answers[0] == answers[1]


def test_compact_comes_back_as_compact(compact, demo):
    plan = qv.plan(compact, vram="8GiB", ram="8GiB")
    assert (plan.profile.weights, plan.profile.lm_head) == ("nf4", "nf4")
    for knobs in ({"profile": "compact"}, {"profile": "auto", "embeddings": "host"}):
        copy, original = (
            qv.plan(model, vram="8GiB", ram="8GiB", **{"weights": "nf4", "lm_head": "nf4", **knobs}).estimate
            for model in (compact, demo)
        )
        assert (copy.weights, copy.host) == (original.weights, original.host)
        assert copy.host == 3072 * 256 * 2
    with pytest.raises(qv.ConfigError, match="the checkpoint is stored with lm_head='nf4', got lm_head='int8'"):
        qv.plan(compact, lm_head="int8")


@pytest.mark.parametrize("weights", QUANTIZED)
def test_loading_the_copy_peaks_at_its_own_size(weights):
    """The 7B shape: what is stored is not quantized again, so no 16-bit tensor is beside it."""
    shape = {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    }  # fmt: skip
    backend = get_backend(weights)
    settings = SimpleNamespace(quantization_config=SimpleNamespace(bnb_4bit_compute_dtype=torch.bfloat16))
    model = type("Model", (torch.nn.Module,), {"dtype": torch.bfloat16, "config": settings})()
    on_the_fly = qv.estimate_vram(shape, weights=weights, lm_head=weights, embeddings="host")
    quantization = backend.saved_config(model, on_the_fly.profile)
    copy = qv.estimate_vram({**shape, "quantization_config": quantization}, embeddings="host")
    assert copy.weights == on_the_fly.weights
    assert copy.weights < copy.load_peak < copy.weights + 2**20
    assert on_the_fly.load_peak > copy.load_peak + 3584 * 18944


def test_shards_and_their_index(demo, tmp_path):
    with load(demo, weights="nf4") as llm:
        report = llm.save_quantized(tmp_path / "many", max_shard_size="1MB", progress=False)
        llm.save_quantized(tmp_path / "one", progress=False)
        expected = logits(llm.model)
    assert len(report.files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    assert index["metadata"]["total_size"] == report.total_bytes
    assert_same(stored(tmp_path / "many"), stored(tmp_path / "one"))
    with qv.load(tmp_path / "many", progress=False) as again:
        assert torch.equal(logits(again.model), expected)


def test_config_and_the_files_beside_it(demo, tmp_path):
    source = shutil.copytree(demo, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", "mine": 1}))
    with load(source, weights="int8") as llm:
        llm.save_quantized(tmp_path / "out", progress=False)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = ours.pop("quantization_config")
    assert ours == {**config, "torch_dtype": "bfloat16", "mine": 1}
    assert quantization["load_in_8bit"] is True
    assert quantization["llm_int8_enable_fp32_cpu_offload"] is False
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*carried, "config.json", "model.safetensors"}
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_4_bit_products_are_computed_in_the_models_dtype_whatever_the_file_says(demo, tmp_path):
    with load(demo, weights="nf4") as llm:
        llm.save_quantized(tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = "float32"  # what transformers takes by default
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with qv.load(tmp_path / "out", progress=False) as llm:
        assert llm.model.model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16


# refusals


@pytest.mark.parametrize("weights", ["bf16", "fp16", "fp32"])
def test_weights_that_are_not_quantized_are_refused(demo, tmp_path, weights):
    text = f"weights='{weights}' cannot be saved quantized: they are not quantized, and the checkpoint"
    with load(demo, weights=weights) as llm, pytest.raises(qv.NotSupportedError, match=text) as caught:
        llm.save_quantized(tmp_path / "out", progress=False)
    assert (caught.value.knob, caught.value.value) == ("weights", weights)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_top_is_refused(untied, adapter, tmp_path):
    peft = pytest.importorskip("peft")
    text = r"an adapter on top is not saved\. .* qv\.merge_lora_then_quantize\(base, adapter, out\)"
    with load(untied, weights="nf4", adapter=adapter) as llm, pytest.raises(qv.NotSupportedError, match=text):
        llm.save_quantized(tmp_path / "out", progress=False)
    with load(untied, weights="nf4") as llm:
        peft.get_peft_model(llm.model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(qv.NotSupportedError, match=text):
            llm.save_quantized(tmp_path / "out", progress=False)
    assert not any(tmp_path.iterdir())


def test_a_backend_that_cannot_save_is_refused():
    from qwen_vram.runtime.saving import save

    class Plugged:
        name = "plugged"

    original, save.get_backend = save.get_backend, lambda weights: Plugged()
    try:
        with pytest.raises(qv.NotSupportedError, match="weights='int4' .* the backend 'plugged' does not say how; use"):
            save.saving_backend("int4")
    finally:
        save.get_backend = original


def test_a_model_with_a_table_of_another_size_is_refused_and_nothing_is_left(demo, tmp_path):
    with load(demo, weights="nf4") as llm:
        llm.model.resize_token_embeddings(3100, mean_resizing=False)
        with pytest.raises(qv.CheckpointError, match=r"of shape \[3072, 256\] by .*, got BF16 of shape \[3100, 256\]"):
            llm.save_quantized(tmp_path / "out", progress=False)
    assert not any(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused(demo, tmp_path, monkeypatch):
    with load(demo, weights="nf4") as llm:
        llm.save_quantized(tmp_path / "out", progress=False)
        before = stored(tmp_path / "out")
        with pytest.raises(qv.CheckpointError, match="exists; choose another folder, or pass overwrite=True"):
            llm.save_quantized(tmp_path / "out", progress=False)
        with pytest.raises(qv.UnitError, match="max_shard_size"):
            llm.save_quantized(tmp_path / "new", max_shard_size="4", progress=False)
        free = shutil.disk_usage(tmp_path)._replace(free=2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(
            qv.CheckpointError, match=r"takes .*MiB, and 1\.0 MiB are free on its disk; free some space"
        ):
            llm.save_quantized(tmp_path / "new", progress=False)
        monkeypatch.undo()
        assert_same(stored(tmp_path / "out"), before)
        (tmp_path / "out" / "stale.json").write_text("{}")
        llm.save_quantized(tmp_path / "out", overwrite=True, progress=False)
        assert not (tmp_path / "out" / "stale.json").exists()
    with qv.load(tmp_path / "out", progress=False) as again:
        with pytest.raises(qv.CheckpointError, match="which is read; choose another folder"):
            again.save_quantized(tmp_path / "out", overwrite=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        llm.save_quantized(tmp_path / "new")


def test_a_disk_that_fails_in_the_middle_leaves_an_earlier_copy(demo, tmp_path):
    import resource

    with load(demo, weights="nf4") as llm:
        llm.save_quantized(tmp_path / "out", progress=False)
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(qv.CheckpointError, match=r"could not be written \(.*\), and nothing of it is left"):
                llm.save_quantized(tmp_path / "out", overwrite=True, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


INTERRUPTED = """
import sys, time
import qwen_vram as qv
from qwen_vram.runtime.saving.writer import CheckpointWriter
write = CheckpointWriter.write
def slowly(self, name, tensor, at=0):
    print("writing", flush=True)
    time.sleep(0.2)
    write(self, name, tensor, at)
CheckpointWriter.write = slowly
with qv.load(sys.argv[1], profile="default", weights="nf4", progress=False) as llm:
    llm.save_quantized(sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_in_the_middle(demo, tmp_path, number):
    """Ctrl-C leaves nothing; what a kill leaves is hidden, and cleared away by the next run."""
    process = Forked(INTERRUPTED, demo, tmp_path / "out")
    while process.said().count("writing\n") < 3:
        assert not process.ended
        time.sleep(0.02)
    os.kill(process.pid, number)
    errors = process.wait(timeout=60).stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert left == []
    else:
        assert left == [".out.partial", ".out.partial.lock"]
    with load(demo, weights="nf4") as llm:
        llm.save_quantized(tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# the command line


def test_quantize_writes_a_checkpoint_that_chat_loads(demo, tmp_path):
    out = str(tmp_path / "out")
    run = qwen_vram
    result = run("quantize", str(demo), out, "--weights", "nf4", "--lm-head", "nf4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{out}: nf4 weights, nf4 head, ")
    assert "42" in run("chat", out, "-m", "What is 12 + 30?").stdout
    again = run("quantize", str(demo), out, "--json")
    assert again.returncode == 2
    assert json.loads(again.stdout)["error"] == "CheckpointError"
    data = json.loads(run("quantize", str(demo), out, "--weights", "int8", "--overwrite", "--json").stdout)
    assert (data["weights"], data["lm_head"], data["files"]) == ("int8", "bf16", ["model.safetensors"])
    refused = run("quantize", str(demo), str(tmp_path / "no"), "--weights", "bf16")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: weights='bf16' cannot be saved quantized")


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["nf4", "int8", "int4", "int8-wo", "fp8"])
@pytest.mark.parametrize("head", [False, True])
def test_on_a_gpu(demo, tmp_path, weights, head):
    out = tmp_path / "out"
    with load(demo, weights=weights, lm_head=weights if head else None, embeddings="host") as llm:
        llm.generate("hello", max_new_tokens=4, do_sample=False)
        before, expected = tensors(llm.model), logits(llm.model)
        llm.save_quantized(out, progress=False)
    assert_same(stored(out), before)
    for embeddings in ("device", "host"):
        with load(out, embeddings=embeddings) as again:
            assert_same(tensors(again.model), before)
            assert torch.equal(logits(again.model), expected)
            measured, promised = again.report().measured, again.plan.estimate
            assert measured["weights"] == promised.weights
            assert measured["load_peak"] == pytest.approx(promised.load_peak, rel=0.05, abs=2**21)
    with qv.load(out, attention="sdpa", progress=False) as again:
        assert torch.equal(logits(again.model), expected)
    plain = AutoModelForCausalLM.from_pretrained(out, device_map={"": 0}, attn_implementation="sdpa")
    assert torch.equal(logits(plain), expected)
