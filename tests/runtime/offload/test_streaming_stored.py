"""Streamed layers of checkpoints that bitsandbytes quantized already: the resident model's logits, bit for bit."""

import shutil
from functools import cache

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import core_model_loading

import qwen_vram as qv
from qwen_vram.arithmetic.weights import block_bytes
from qwen_vram.runtime.loading import load as loader
from tests.conftest import make_checkpoint
from tests.helpers.tiers import thinned
from tests.runtime.offload.test_streaming import GREEDY, PROMPTS, load, logits, tokens

NEW = 12 if torch.cuda.is_available() else 4

QUANTIZED = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8")
ON_TOP = [
    {"cache": "preallocated", "kv_cache": "int8", "prefill_chunk_size": 16},
    {"cache": "preallocated", "kv_device": "host", "attention": "fused", "embeddings": "host"},
    {"dequantization": "tiled", "cache": "preallocated"},
]
# config.json of Qwen2.5-7B, as far as bytes go.
SEVEN_B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A call that gives the quantized copy of a checkpoint, made once."""

    @cache
    def save(model, weights, lm_head=None):
        out = tmp_path_factory.mktemp("saved") / weights
        with load(model, weights=weights, lm_head=lm_head) as llm:
            llm.save_quantized(out, progress=False)
        return out

    return save


@cache
def resident(folder, attention="sdpa"):
    """Logits, and the tokens of one prompt and of three, without streaming."""
    with load(folder, attention=attention) as llm:
        return logits(llm), tokens(llm, PROMPTS[:1], NEW), tokens(llm, PROMPTS[:3], NEW)


def check_bit_for_bit(folder, streamed):
    before, one, three = resident(folder)
    with load(folder, streamed_layers=streamed) as llm:
        estimate, engine = llm.plan.estimate, llm._streamer
        for _ in range(2):
            assert torch.equal(logits(llm), before)
        assert torch.equal(tokens(llm, PROMPTS[:1], NEW), one)
        assert torch.equal(tokens(llm, PROMPTS[:3], NEW), three)
        assert llm.report().measured["weights"] == estimate.weights
        block = block_bytes(estimate.architecture, estimate.profile)
        assert [one.blob.nbytes for one in engine.blocks] == [block] * streamed
        assert estimate.host == streamed * block
        assert {slot.memory.nbytes for slot in engine.slots} == {block}


@pytest.mark.parametrize(*thinned(1, weights=QUANTIZED, case=[(False, 1), (False, 3), (False, 5), (True, 3)]))
def test_logits_tokens_and_bytes_are_those_of_the_resident_copy(saved, demo, weights, case):
    head, streamed = case
    check_bit_for_bit(saved(demo, weights, weights if head else None), streamed)


@pytest.mark.parametrize(*thinned(1, model=["tied", "qwen3", "sharded"], weights=["nf4", "int8"]))
def test_other_models_and_files_stream_too(request, saved, model, weights):
    check_bit_for_bit(saved(request.getfixturevalue(model), weights), 2)


def test_more_than_ten_layers(saved, tmp_path):
    deep = make_checkpoint(tmp_path, num_hidden_layers=12, hidden_size=128, intermediate_size=256)
    check_bit_for_bit(saved(deep, "nf4", "nf4"), 6)


def test_a_checkpoint_of_plain_transformers_in_several_files(untied, tmp_path):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(untied, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    transformers.AutoTokenizer.from_pretrained(untied).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_bit_for_bit(tmp_path, 2)


@pytest.mark.parametrize(("skipped", "even"), [("o_proj", True), ("model.layers.2.mlp", False)])
def test_modules_that_were_left_in_16_bits_stream_as_they_are(untied, tmp_path, skipped, even):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head", skipped],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(untied, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(untied).save_pretrained(tmp_path)
    if even:
        check_bit_for_bit(tmp_path, 2)
        return
    # Which layers stream is not known to the arithmetic: where they differ in size, it counts from above.
    with load(tmp_path, streamed_layers=1) as llm:
        assert torch.equal(logits(llm), resident(tmp_path)[0])
        assert llm.report().measured["weights"] <= llm.plan.estimate.weights
        assert llm._streamer.blocks[0].blob.nbytes <= llm.plan.estimate.host


# what is read, and what is not


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_transformers_reads_nothing_of_a_streamed_layer(saved, untied, tmp_path, monkeypatch, weights):
    folder = saved(untied, weights, weights)
    read, materialize, pack = [], core_model_loading._materialize_copy, loader.pack_layers

    def reading(tensor, device=None, dtype=None):
        made = materialize(tensor, device, dtype)
        read.append(0 if made.is_meta else made.nbytes)
        return made

    def packing(model, away, *rest):
        assert away.streamed == {0, 2}
        for number, layer in enumerate(model.model.layers):
            assert {parameter.is_meta for parameter in layer.parameters()} == {number in away.streamed}
        files = set(tmp_path.iterdir())
        blocks = pack(model, away, *rest)
        assert set(tmp_path.iterdir()) == files == set()
        return blocks

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core_model_loading, "_materialize_copy", reading)
    monkeypatch.setattr(loader, "pack_layers", packing)
    load(folder, streamed_layers=2).close()
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    away = ("model.layers.0.", "model.layers.2.")
    assert sum(read) == sum(nbytes for name, nbytes in sizes.items() if not name.startswith(away))


def test_nothing_is_said_of_what_is_left_out(saved, untied, caplog, capfd):
    load(saved(untied, "nf4"), streamed_layers=2).close()
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4"])
def test_a_matrix_without_a_part_is_refused_before_anything_is_loaded(saved, untied, tmp_path, part):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(saved(untied, "nf4"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors[f"model.layers.2.mlp.up_proj.weight.{part}"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(qv.CheckpointError, match=rf"is stored in nf4 .* lacks '.*up_proj\.weight\.{part}'"):
        load(broken, streamed_layers=2)


def test_formats_of_torchs_own_operators_are_refused_by_name(saved, untied):
    with pytest.raises(qv.NotSupportedError, match="streamed_layers=2 with weights='int8-wo': .* that do: fp32, bf16"):
        load(saved(untied, "int8-wo"), streamed_layers=2)


# what runs on top


@pytest.mark.parametrize("knobs", ON_TOP, ids=str)
def test_caches_chunks_and_tiles_work_as_without(saved, demo, knobs):
    answers = []
    for streamed in (0, 4):
        with load(saved(demo, "nf4", "nf4"), streamed_layers=streamed, batch_size=4, **knobs) as llm:
            answers.append(
                [llm.generate(prompts, max_new_tokens=NEW, **GREEDY) for prompts in (PROMPTS[3], PROMPTS[:3])]
            )
    assert answers[0] == answers[1]


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_an_adapter_stays_on_the_device(saved, untied, adapter, weights):
    pytest.importorskip("peft")
    folder = saved(untied, weights)
    with load(folder, adapter=adapter) as llm:
        expected = logits(llm)
    with load(folder, adapter=adapter, streamed_layers=3) as llm:
        assert torch.equal(logits(llm), expected)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights


@pytest.mark.parametrize("weights", QUANTIZED)
def test_it_is_saved_again_as_it_was(saved, demo, tmp_path, weights):
    folder = saved(demo, weights, weights)
    with load(folder, streamed_layers=3) as llm:
        llm.generate("hello", max_new_tokens=3, **GREEDY)
        llm.save_quantized(tmp_path / "again", progress=False)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# plans


def stored_config(weights, lm_head):
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = {"int8": {"load_in_8bit": True}, "nf4": four_bit}[weights]
    skipped = [] if lm_head else ["lm_head"]
    return {**SEVEN_B, "quantization_config": {
        "quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped, **quantization
    }}  # fmt: skip


@pytest.mark.parametrize("vram", ["3GiB", "4GiB"])
def test_a_small_budget_streams_a_stored_checkpoint_as_it_would_its_original(vram):
    workload = {"prompt_len": 8000, "max_new_tokens": 64, "vram": vram, "ram": "64GiB"}
    plan = qv.plan(stored_config("nf4", "nf4"), **workload)
    assert plan.profile.streamed_layers > 0
    assert (plan.profile.weights, plan.profile.lm_head) == ("nf4", "nf4")
    assert plan.estimate.needed_bytes <= plan.budget.vram
    quantized_now = qv.plan(SEVEN_B, weights="nf4", lm_head="nf4", **workload)
    floors = [made.steps[-1].decode_floor_ms for made in (plan, quantized_now)]
    # They load in other ways, which may cost one of them a layer.
    assert floors[0] == pytest.approx(floors[1], abs=1.01 * floors[1] / quantized_now.profile.streamed_layers)
    same = qv.estimate_vram(SEVEN_B, plan.profile, prompt_len=8000, max_new_tokens=64)
    assert (plan.estimate.weights, plan.estimate.host) == (same.weights, same.host)


@pytest.mark.parametrize("lm_head", [None, "own"])
@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_loading_holds_what_stays_and_the_slots(weights, lm_head):
    small = 2**21  # what the allocator cannot split off
    for streamed in (1, 14, 28):
        estimate = qv.estimate_vram(stored_config(weights, lm_head), streamed_layers=streamed)
        assert estimate.weights <= estimate.load_peak < estimate.weights + small


def test_a_plan_of_a_saved_copy_streams_and_loads(saved, demo):
    folder = saved(demo, "nf4")
    resident = qv.plan(folder, vram="8GiB", ram="8GiB", profile="auto", prompt_len=64)
    plan = qv.plan(folder, vram="8GiB", ram="8GiB", prompt_len=64, streamed_layers=5)
    assert plan.estimate.weights < resident.estimate.weights
    with qv.load(folder, streamed_layers=5, prompt_len=64, progress=False, verify=True) as llm:
        assert llm.chat("What is 12 + 30?", do_sample=False).startswith("12 + 30 = 42")


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("streamed", [1, 3, 12])
@pytest.mark.parametrize("embeddings", ["device", "host"])
@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_on_a_gpu_tokens_and_bytes_are_those_that_were_promised(saved, wide, weights, embeddings, streamed):
    folder = saved(wide, weights, weights)
    # For a padded batch sdpa may choose cuDNN, whose answers are not always the same.
    before, one, three = resident(folder, attention="fused")
    torch.cuda.empty_cache()
    knobs = {"attention": "fused", "embeddings": embeddings, "cache": "preallocated", "batch_size": 4}
    with load(folder, streamed_layers=streamed, **knobs) as llm:
        promised, measured = llm.plan.estimate, llm.report().measured
        assert measured["weights"] == promised.weights
        assert measured["load_peak"] <= 1.01 * promised.load_peak + 2**21
        assert all(block.blob.is_pinned() for block in llm._streamer.blocks)
        assert torch.equal(logits(llm), before)
        assert torch.equal(tokens(llm, PROMPTS[:1], NEW), one)
        assert torch.equal(tokens(llm, PROMPTS[:3], NEW), three)
        report = llm.probe()
        promised, measured = report.estimate.peak_allocated, report.measured["peak_allocated"]
        assert measured == pytest.approx(promised, rel=0.01, abs=2**21)
