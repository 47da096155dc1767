"""Llama: a family in one file, held against `transformers` by its weights, its refusals and its tokens."""

import dataclasses
import functools
import json
import logging

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.weights import stored_weights
from tests.helpers.llama import LLAMA3, make_llama
from tests.helpers.lora_models import make_adapter, peft_model

# Source: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
LLAMA_3_2_1B = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072,
    "tie_word_embeddings": True, "rope_theta": 500_000.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Source: https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json
TINY_LLAMA = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Source: https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
LLAMA_2_7B = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
BIASED = {**TINY_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 96}
# Parameters. Source: the published checkpoints' safetensors headers; those of BIASED are transformers' alone.
SIZES = {
    "Llama-3.2-1B": (LLAMA_3_2_1B, 1_235_814_400),
    "TinyLlama": (TINY_LLAMA, 1_100_048_384),
    "Llama-2-7b": (LLAMA_2_7B, 6_738_415_616),
    "biased": (BIASED, None),
}
PROMPT, NEW = 40, 12
ASKED = {"profile": "default", "prompt_len": PROMPT, "max_new_tokens": NEW, "progress": False}


@functools.cache
def on_meta(name):
    """A `transformers` model that has no memory."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[name][0]), dtype=torch.bfloat16)


def config_of(name):
    return {"model_type": "llama", **SIZES[name][0]}


@pytest.mark.parametrize("name", SIZES)
def test_every_weight_is_the_one_that_transformers_makes(name):
    architecture = qv.Architecture.from_config(config_of(name))
    made = {key: tuple(one.shape) for key, one in on_meta(name).named_parameters()}
    assert {weight.name: weight.shape for weight in architecture.weights()} == made
    assert [weight.name for weight in architecture.weights()] == list(made)
    count = sum(one.numel() for one in on_meta(name).parameters())
    assert architecture.num_parameters == count == (SIZES[name][1] or count)


@pytest.mark.parametrize("name", SIZES)
def test_the_estimate_counts_the_bytes_of_transformers(name):
    estimate = qv.estimate_vram(config_of(name), "default", prompt_len=512, max_new_tokens=64)
    assert estimate.weights == sum(one.numel() * one.element_size() for one in on_meta(name).parameters())
    config = on_meta(name).config
    width = config.num_key_value_heads * config.head_dim
    assert estimate.kv_cache == 2 * config.num_hidden_layers * width * 2 * (512 + 64)
    biased = name == "biased"
    assert sum(
        one.weight.name.endswith(".bias") for one in stored_weights(estimate.architecture, estimate.profile)
    ) == (7 * config.num_hidden_layers if biased else 0)


def test_positions_are_those_that_the_model_was_trained_with(caplog):
    with caplog.at_level(logging.WARNING):
        assert qv.estimate_vram(config_of("Llama-3.2-1B"), prompt_len=100_000, max_new_tokens=31_072).weights
    assert not caplog.records
    with pytest.raises(qv.WorkloadError, match="past the model's max_position_embeddings 131072; shorten one of them$"):
        qv.estimate_vram(config_of("Llama-3.2-1B"), prompt_len=131_072, max_new_tokens=1)
    yarn = {**config_of("TinyLlama"), "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert qv.Architecture.from_config(yarn).max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not counted; every Llama of these kinds has 'silu'"),
        ({"num_attention_heads": 24}, "hidden_size 2048 is not a multiple of num_attention_heads 24"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": 65}, "head_dim 65 is odd"),
        ({"mlp_bias": "yes"}, "mlp_bias must be true or false, got 'yes'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "of the rope_type 'llama3' needs a factor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_by_its_key(change, text):
    with pytest.raises(qv.ConfigError, match=text):
        qv.estimate_vram({**config_of("TinyLlama"), **change})


def test_a_plan_comes_back_from_json():
    plan = qv.plan(config_of("Llama-3.2-1B"), vram="3GiB", ram="16GiB", prompt_len=64, max_new_tokens=16)
    again = qv.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.estimate == plan.estimate
    assert again.estimate.architecture.layers[0] is again.estimate.architecture.layers[-1]


def test_layers_that_differ_are_counted_one_by_one():
    whole = qv.Architecture.from_config(config_of("TinyLlama"))
    wider = qv.Architecture.from_config({**config_of("TinyLlama"), "intermediate_size": 8192, "num_key_value_heads": 8})
    few, many = whole.layers[0], wider.layers[0]
    mixed = dataclasses.replace(whole, layers=(few, many) * 11)
    assert mixed.kinds == ((few, 11), (many, 11))
    half = {"prompt_len": 256, "max_new_tokens": 8}
    for weights in ("bf16", "nf4", "int8"):
        one, two, both = (qv.estimate_vram(model, weights=weights, **half) for model in (whole, wider, mixed))
        assert 2 * both.weights == one.weights + two.weights
        assert 2 * both.kv_cache == one.kv_cache + two.kv_cache
        assert {moment.name for moment in both.moments} == {moment.name for moment in one.moments}
        assert max(moment.activations for moment in both.moments) == max(moment.activations for moment in two.moments)
    # Odd layers stream, which are the wider ones: a slot holds the largest of them.
    streamed = qv.estimate_vram(mixed, "default", streamed_layers=11, **half)
    outer = sum(weight.numel for weight in mixed.outer)
    assert streamed.weights == 2 * (11 * few.numel + 2 * many.numel + outer)
    assert streamed.host == 2 * 11 * many.numel


@pytest.fixture(scope="module", params=["plain", "biased"])
def folder(request, tmp_path_factory):
    biased = {"attention_bias": True, "mlp_bias": True} if request.param == "biased" else {}
    return make_llama(tmp_path_factory.mktemp(request.param), **biased)


def prompt():
    import torch

    return torch.randint(1, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(7))


def written(model, ids, **options):
    import torch

    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)
    return made[0, PROMPT:].tolist()


@functools.cache
def of_transformers(folder, weights):
    """The tokens of plain `transformers` with bitsandbytes' own configuration."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = None
    if weights == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif weights == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )
    return written(model, prompt())


CASES = {
    "bf16": {"weights": "bf16"},
    "nf4": {"weights": "nf4"},
    "int8": {"weights": "int8"},
    "bf16 streamed": {"weights": "bf16", "streamed_layers": 3},
    "nf4 streamed": {"weights": "nf4", "streamed_layers": 2},
    "bf16 from the disk": {"weights": "bf16", "streamed_layers": 3, "disk_layers": 2},
    # They sum in another order than `transformers`: in bf16, two tokens of random weights may then tie.
    "fp32 fused kernels": {"weights": "fp32", "kernels": "fused"},
    "fp32 in chunks": {"weights": "fp32", "prefill_chunk_size": 16, "cache": "preallocated"},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers_and_weights_those_predicted(folder, case):
    knobs = CASES[case]
    with qv.load(folder, device="cpu", **ASKED, **knobs) as llm:
        assert type(llm.model).__name__ == "LlamaForCausalLM"
        assert written(llm.model, prompt()) == of_transformers(folder, knobs["weights"])
        assert llm.report().measured["weights"] == llm.plan.estimate.weights


def test_a_decode_step_of_its_own_gives_the_same_tokens(folder):
    import torch

    from qwen_vram.runtime.decoding.graph_cache import GraphCache
    from qwen_vram.runtime.decoding.graph_decoder import Decoder

    ids = prompt()
    with qv.load(folder, device="cpu", **ASKED, weights="fp32") as llm, torch.inference_mode():
        decoder = Decoder(llm.model, batch_size=1, max_length=PROMPT + NEW, backend=None)
        cache = GraphCache(decoder, num_hidden_layers=decoder.layers, max_length=PROMPT + NEW)
        logits = llm.model(ids, past_key_values=cache).logits[:, -1]
        tokens = [int(logits.argmax())]
        step = cache.step()
        step.begin(PROMPT, torch.zeros(1, dtype=torch.long), torch.tensor([[PROMPT]]))
        while len(tokens) < NEW:
            tokens.append(int(step(torch.tensor(tokens[-1:])).argmax()))
        assert tokens == of_transformers(folder, "fp32")
        decoder.close()


def test_an_adapter_runs_beside_it_and_is_merged(folder, tmp_path):
    import torch

    adapter = make_adapter(folder, tmp_path / "adapter", target_modules="all-linear", r=4, size=0.1)
    with torch.inference_mode():
        expected = peft_model(folder, adapter)(prompt()).logits
    wide = {**ASKED, "weights": "fp32"}
    with qv.load(folder, device="cpu", adapter=adapter, **wide) as llm, torch.inference_mode():
        torch.testing.assert_close(llm.model(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
    merged = tmp_path / "merged"
    qv.merge_lora_then_quantize(folder, adapter, merged, quantize=None, progress=False)
    with qv.load(merged, device="cpu", **ASKED) as llm, torch.inference_mode():
        logits = llm.model(prompt()).logits.float()
        assert logits.argmax(-1).eq(expected.argmax(-1)).float().mean() > 0.9


def test_a_merge_into_4_bits_loads_as_it_is_stored(folder, tmp_path):
    adapter = make_adapter(folder, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], r=4)
    qv.merge_lora_then_quantize(folder, adapter, tmp_path / "merged", quantize="nf4", progress=False)
    predicted = qv.estimate_vram(tmp_path / "merged", prompt_len=PROMPT, max_new_tokens=NEW)
    assert predicted.profile.weights == "nf4"
    with qv.load(tmp_path / "merged", device="cpu", **ASKED) as llm:
        assert llm.report().measured["weights"] == predicted.weights == llm.plan.estimate.weights
        tokens = written(llm.model, prompt())
        llm.save_quantized(tmp_path / "saved", progress=False)
    with qv.load(tmp_path / "saved", device="cpu", **ASKED) as llm:
        assert written(llm.model, prompt()) == tokens
        assert llm.plan.estimate.weights == predicted.weights
