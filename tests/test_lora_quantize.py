"""Merged and quantized at once: every stored byte is what bitsandbytes makes of the whole merged tensor."""

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from bitsandbytes.functional import quantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qwen_vram as qv
from qwen_vram.lora import stored as stored_module
from qwen_vram.lora.fourbit import FourBit
from qwen_vram.lora.merge import merge_lora_then_quantize
from qwen_vram.lora.quantize import QUANTIZATIONS, codec_for
from qwen_vram.lora.stored import pieces
from tests.lora_models import (
    assert_same,
    load,
    logits,
    make_adapter,
    make_base,
    peft_merged,
    peft_model,
    stored,
)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-plain": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def on_load(folder: Path, quantize: str, dtype=torch.bfloat16):
    """What transformers makes of a 16-bit checkpoint while loading it."""
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


@pytest.mark.parametrize("kind", ["untied", "tied", "qwen3"])
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
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


def test_the_head_and_the_embedding_stay_in_16_bit(merged, tmp_path):
    base, adapter, in_memory = merged["untied"]
    merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize="nf4", device="cpu", progress=False)
    ours, whole = stored(tmp_path / "out"), stored(in_memory)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(ours[name], whole[name])


def test_unquantized_formats_are_named_until_they_can_be_written(merged, tmp_path):
    base, adapter, _ = merged["untied"]
    for quantize in ("gptq-int4", "int4"):
        text = f"quantize='{quantize}' cannot be written while merging; merge with quantize=None, then quantize"
        with pytest.raises(qv.BackendUnavailableError, match=text):
            merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize=quantize)
    with pytest.raises(
        qv.UnknownNameError, match="unknown quantization 'nf5'; choose from nf4, nf4-plain, fp4, int8, No"
    ):
        merge_lora_then_quantize(base, adapter, tmp_path / "out", quantize="nf5")
    assert not (tmp_path / "out").exists()


def test_bitsandbytes_missing(monkeypatch):
    monkeypatch.setattr("qwen_vram.lora.quantize.find_spec", lambda name: None)
    with pytest.raises(
        qv.BackendUnavailableError, match="quantize='int8' needs bitsandbytes, which is not installed; run"
    ):
        codec_for("int8")
    assert codec_for(None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, *QUANTIZATIONS])
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
