"""Merged and quantized at once: every stored byte is what bitsandbytes, or `load()`, makes of the whole tensor."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from bitsandbytes.functional import quantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qwen_vram as qv
from qwen_vram.lora import tensor_file as stored_module
from qwen_vram.lora.codecs.bnb_4bit import FourBit
from qwen_vram.lora.codecs.registry import QUANTIZATIONS, codec_for
from qwen_vram.lora.merge import merge_lora_then_quantize
from qwen_vram.lora.tensor_file import pieces
from tests.helpers.lora_models import (
    assert_same,
    load,
    logits,
    make_adapter,
    make_base,
    peft_merged,
    peft_model,
    stored,
    untied_twin,
)
from tests.helpers.tiers import thinned

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-plain": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
OWN = tuple(name for name in QUANTIZATIONS if name not in OPTIONS)


def on_load(folder: Path, quantize: str, dtype=torch.bfloat16):
    """Return the model that transformers makes of a 16-bit checkpoint while it loads."""
    config = BitsAndBytesConfig(**OPTIONS[quantize], bnb_4bit_compute_dtype=dtype)
    return load(folder, dtype, quantization_config=config, device_map={"": "cpu"})


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """Base, adapter and PEFT's merge of them in float32, rounded to bf16 and saved, by the kind of base."""
    root = tmp_path_factory.mktemp("merged")
    made = {}
    for name, options in {"untied": {}, "tied": {"tied": True}, "qwen3": {"kind": "qwen3", "tied": True}}.items():
        base = make_base(root / name, intermediate_size=320, **options)
        if name == "qwen3":
            # Heads of 32, so that o_proj's columns are whole blocks, which bitsandbytes' CPU kernel asks for.
            base = make_base(root / f"{name}-32", intermediate_size=320, num_attention_heads=4, head_dim=32, **options)
        tables = ["lm_head", "embed_tokens"] if name == "untied" else []
        adapter = make_adapter(base, root / f"{name}-adapter", target_modules=[*LINEAR, *tables], size=0.02)
        model = peft_merged(peft_model(base, adapter)).to(torch.bfloat16)
        model.save_pretrained(root / f"{name}-merged")
        made[name] = (base, adapter, root / f"{name}-merged")
    return made


@pytest.mark.parametrize(*thinned(1, quantize=list(OPTIONS), kind=["untied", "tied", "qwen3"]))
def test_the_same_as_merging_in_memory_and_quantizing_on_load(merged, tmp_path, monkeypatch, quantize, kind):
    """The same files as transformers saves, and, loaded by plain transformers, the same logits."""
    base, adapter, in_memory = merged[kind]
    monkeypatch.setattr(stored_module, "PIECE", 2048)
    merge_lora_then_quantize(base, adapter, tmp_path / "ours", quantize=quantize, device="cpu", progress=False)
    model = on_load(in_memory, quantize)
    # Saved before it runs: bitsandbytes repacks weights on the CPU's first forward, and does not undo that exactly.
    model.save_pretrained(tmp_path / "theirs")
    assert_same(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    ours, theirs = (config["quantization_config"] for config in configs)
    assert ours.pop("llm_int8_skip_modules") == ["lm_head"]
    assert theirs.pop("llm_int8_skip_modules") is None
    if quantize == "int8":
        del ours["bnb_4bit_compute_dtype"], theirs["bnb_4bit_compute_dtype"]
    assert ours == theirs
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map={"": "cpu"})
    assert loaded.get_output_embeddings().weight.dtype == torch.bfloat16
    assert loaded.config.tie_word_embeddings is (kind != "untied")
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture(scope="module")
def answering(untied, tied, qwen3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """The same of bases with a tokenizer, which `qv.load()` asks for."""
    root = tmp_path_factory.mktemp("answering")
    kinds = {
        "untied": (untied, {"target_modules": [*LINEAR, "lm_head", "embed_tokens"], "use_dora": True, "bias": "all"}),
        "tied": (tied, {"target_modules": LINEAR[:3], "lora_bias": True}),
        "tied, an update of the head": (tied, {"target_modules": [*LINEAR, "lm_head"]}),
        "qwen3": (qwen3, {"target_modules": LINEAR, "use_rslora": True}),
    }
    made = {}
    for number, (name, (base, settings)) in enumerate(kinds.items()):
        adapter = make_adapter(base, root / f"{number}-adapter", size=0.02, **settings)
        twin = untied_twin(base, root / f"{number}-twin") if "head" in name else base
        model = peft_merged(peft_model(twin, adapter)).to(torch.bfloat16)
        in_memory = shutil.copytree(twin, root / f"{number}-merged")
        model.save_pretrained(in_memory)
        made[name] = (base, adapter, in_memory)
    return made


@pytest.mark.parametrize(*thinned(1, quantize=OWN, kind=["untied", "tied", "tied, an update of the head", "qwen3"]))
def test_the_same_as_merging_in_memory_loading_and_saving(answering, tmp_path, monkeypatch, quantize, kind):
    """Byte for byte; it loads with no knob, to the same logits."""
    base, adapter, in_memory = answering[kind]
    monkeypatch.setattr(stored_module, "PIECE", 2**15)
    merge_lora_then_quantize(base, adapter, tmp_path / "ours", quantize=quantize, device="cpu", progress=False)
    with qv.load(in_memory, profile="default", device="cpu", weights=quantize, progress=False) as llm:
        llm.save_quantized(tmp_path / "theirs", progress=False)
        expected = logits(llm.model)
    assert_same(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    for key in ("quantization_config", "tie_word_embeddings", "dtype"):
        assert ours[key] == theirs[key], key
    assert ours["tie_word_embeddings"] is (kind in ("tied", "qwen3"))
    with qv.load(tmp_path / "ours", device="cpu", progress=False) as llm:
        assert (llm.plan.profile.weights, llm.plan.profile.lm_head) == (quantize, None)
        assert torch.equal(logits(llm.model), expected)


@pytest.mark.parametrize("quantize", OWN)
def test_a_base_in_fp16_is_quantized_as_load_does(untied, tmp_path, quantize):
    """In bf16, which it computes in."""
    base = shutil.copytree(untied, tmp_path / "base")
    load(untied, torch.float16).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, size=0.02)
    merge_lora_then_quantize(base, adapter, tmp_path / "merged", quantize=None, device="cpu", progress=False)
    merge_lora_then_quantize(base, adapter, tmp_path / "ours", quantize=quantize, device="cpu", progress=False)
    with qv.load(tmp_path / "merged", profile="default", device="cpu", weights=quantize, progress=False) as llm:
        expected, tensors = logits(llm.model), llm.model.state_dict()
    with qv.load(tmp_path / "ours", device="cpu", progress=False) as llm:
        assert_same(llm.model.state_dict(), tensors)
        assert torch.equal(logits(llm.model), expected)


def test_a_shape_that_int4_has_no_place_for_is_refused(merged, tmp_path):
    base, adapter, _ = merged["untied"]
    with pytest.raises(
        qv.ConfigError, match="columns are one of 128, got 64 x 320; use 'nf4', which has no such limit"
    ):
        merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize="int4", device="cpu", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_base_of_another_dtype(tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype=dtype, intermediate_size=128)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize="nf4", device="cpu", progress=False)
    peft_merged(peft_model(base, adapter)).to(dtype).save_pretrained(tmp_path / "merged")
    on_load(tmp_path / "merged", "nf4", dtype).save_pretrained(tmp_path / "theirs")
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "theirs"))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("seed", range(12))
def test_pieces_of_a_tensor_quantize_as_the_whole(monkeypatch, quant_type, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = (rng.randint(1, 300), rng.choice([1, 3, 16, 63, 64, 65, 96, 128, 200, 512]))
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    whole = (torch.randn(shape) * 10 ** rng.uniform(-4, 2)).to(dtype)
    whole[torch.rand(shape) < rng.choice([0, 0.3])] = 0
    whole[: rng.choice([0, 1, shape[0]])] *= rng.choice([0, 1])
    monkeypatch.setattr(stored_module, "PIECE", rng.choice([64, 5000, 2**21]))
    codec = FourBit(quant_type, nested=seed % 2 == 0)
    encoded = [codec.encode(whole[start:stop]) for start, stop in pieces(*shape, step=codec.row_step(shape[1]))]
    rest, _ = codec.finish(torch.cat([scales for _, scales in encoded]), shape, dtype)
    codes, state = quantize_4bit(whole, blocksize=64, quant_type=quant_type, compress_statistics=seed % 2 == 0)
    assert torch.equal(torch.cat([piece for piece, _ in encoded]), codes)
    expected = {f".weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    assert sorted(rest) == sorted(expected)
    for name, tensor in expected.items():
        assert rest[name].dtype == tensor.dtype
        assert torch.equal(rest[name], tensor), name
    parts = {part.ending: part for part in codec.parts(shape)}
    assert parts.pop(".weight").shape == tuple(codes.shape)
    assert sorted(parts) == sorted(expected)
    for name, part in parts.items():
        assert part.shape in (None, tuple(expected[name].shape)), name


def test_values_on_and_beside_every_midpoint():
    """Ties and their neighbours in float32 go where bitsandbytes puts them."""
    from bitsandbytes.functional import get_4bit_type

    for quant_type in ("nf4", "fp4"):
        table = get_4bit_type(quant_type, device="cpu").sort().values
        middle = (table[:-1] + table[1:]) / 2
        infinity = torch.tensor(float("inf"))
        near = torch.cat([middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity), table])
        values = torch.zeros(128)
        values[: len(near)] = near
        values[63] = values[127] = 1.0
        codes, _ = FourBit(quant_type, nested=False).encode(values.view(2, 64))
        expected, _ = quantize_4bit(values.view(2, 64), blocksize=64, quant_type=quant_type)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_in_the_cells_of_midpoints_and_their_neighbours(quant_type):
    """Tens of thousands that are compared with a midpoint, and as many that are only looked up."""
    from bitsandbytes.functional import get_4bit_type

    torch.manual_seed(0)
    table = get_4bit_type(quant_type, device="cpu").sort().values
    middle = ((table[:-1] + table[1:]) / 2)[torch.randint(15, (2**14, 64))]
    values = middle + (torch.rand(2**14, 64) - 0.5) * 2**-13
    values[:, 0] = 1.0
    values *= torch.rand(2**14, 1) + 0.5
    codes, scales = FourBit(quant_type, nested=False).encode(values)
    expected, state = quantize_4bit(values, blocksize=64, quant_type=quant_type)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, state.absmax)


def test_numbers_that_are_none_stay_in_their_blocks():
    """The proof tells of them; looking up their codes is no error."""
    values = torch.randn(6, 64)
    expected = FourBit("nf4", nested=False).encode(values)
    values[1, 5], values[3, 0], values[4, 63] = float("nan"), float("inf"), float("-inf")
    found = FourBit("nf4", nested=False).encode(values)
    for block in (0, 2, 5):
        assert torch.equal(found[0].view(6, 32)[block], expected[0].view(6, 32)[block])
        assert found[1][block] == expected[1][block]
    assert not found[1][[1, 3, 4]].isfinite().any()


def test_the_head_and_the_embedding_stay_in_16_bit(merged, tmp_path):
    base, adapter, in_memory = merged["untied"]
    merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize="nf4", device="cpu", progress=False)
    ours, whole = stored(tmp_path / "out"), stored(in_memory)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(ours[name], whole[name])


def test_what_is_no_format_is_refused(merged, tmp_path):
    base, adapter, _ = merged["untied"]
    names = "nf4, nf4-plain, fp4, int8, int4, int8-wo, fp8, gptq-int4, gptq-int8, None"
    with pytest.raises(qv.UnknownNameError, match=f"unknown quantization 'nf5'; choose from {names}"):
        merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize="nf5")
    assert not (tmp_path / "out").exists()


def test_bitsandbytes_missing(monkeypatch):
    monkeypatch.setattr("qwen_vram.lora.codecs.registry.find_spec", lambda name: None)
    with pytest.raises(
        qv.BackendUnavailableError, match="quantize='int8' needs bitsandbytes, which is not installed; run"
    ):
        codec_for("int8")
    assert codec_for(None) is None
    assert codec_for("int4") is not None  # torch's own operators need no library


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, *OPTIONS])
def test_on_a_gpu(merged, tmp_path, quantize):
    """Codes may differ from the CPU's where float32 sums do; the model is the same to bf16's precision."""
    base, adapter, in_memory = merged["untied"]
    merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize=quantize, device="cuda", progress=False)
    if quantize is None:
        theirs, ours = stored(in_memory), stored(tmp_path / "out")
        assert all(torch.allclose(ours[name].float(), theirs[name].float(), rtol=2**-7, atol=1e-6) for name in theirs)
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": 0})
    config = BitsAndBytesConfig(**OPTIONS[quantize], bnb_4bit_compute_dtype=torch.bfloat16)
    other = load(in_memory, torch.bfloat16, quantization_config=config, device_map={"": 0})
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), other(ids).logits.float()
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", OWN)
def test_own_formats_on_a_gpu(answering, tmp_path, quantize):
    base, adapter, in_memory = answering["untied"]
    merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize=quantize, device="cuda", progress=False)
    ids = torch.arange(3, 40, device="cuda")[None]
    made = []
    for folder, knobs in ((tmp_path / "out", {}), (in_memory, {"profile": "default", "weights": quantize})):
        with qv.load(folder, progress=False, **knobs) as llm, torch.no_grad():
            made.append(llm.model(ids).logits.float())
    ours, theirs = made
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
