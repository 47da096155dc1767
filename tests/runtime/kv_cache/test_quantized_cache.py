"""The KV cache in 8 and 4 bits: its bytes, its error, and what generations do with it."""

import itertools
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_vram as qv
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache, cache_bytes
from qwen_vram.runtime.kv_cache.quantized import QuantizedLayer
from qwen_vram.spec.kv_formats import KV_FORMAT_NAMES, KV_FORMATS, kv_format
from tests.helpers.tiers import thinned

KINDS = ("int8", "int4")
# Half a step of the scale, and the rounding of the scale and the least value to float16.
STEPS = {"int8": 255, "int4": 15}


def states(tokens, *, batch=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    # Channels of very different size, as rotated keys have.
    sizes = torch.logspace(-2, 2, 16)
    return ((torch.randn(batch, 3, tokens, 16) + 0.5) * sizes).to(dtype)


def fill(kind, chunks, *, dtype=torch.float32, max_length=None):
    layer = QuantizedLayer(max_length or sum(chunks), kind)
    keys, values = states(sum(chunks), dtype=dtype), states(sum(chunks), dtype=dtype, seed=1)
    start, out = 0, None
    for chunk in chunks:
        out = layer.update(keys[:, :, start : start + chunk], values[:, :, start : start + chunk])
        start += chunk
    return layer, keys, values, out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 127, 128, 159, 160, 161, 400, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_bytes_are_the_predicted_ones(demo, kind, tokens, batch_size):
    estimate = qv.estimate_vram(
        demo, kv_cache=kind, cache="preallocated", prompt_len=tokens, max_new_tokens=1, batch_size=batch_size
    )
    shape = estimate.architecture
    cache = PreallocatedCache(shape.num_hidden_layers, max_length=tokens + 1, kv_cache=kind)
    attention = shape.layers[0].attention
    state = torch.zeros(batch_size, attention.key_value_heads, 1, attention.head_dim, dtype=torch.bfloat16)
    for layer in range(shape.num_hidden_layers):
        cache.update(state, state, layer)
    assert cache_bytes(cache) == estimate.kv_cache


@pytest.mark.parametrize("make", [kv_format, partial(QuantizedLayer, 8), partial(PreallocatedCache, 1, max_length=8)])
def test_an_unknown_format_is_refused_and_never_counted_as_another(make):
    with pytest.raises(qv.UnknownNameError, match="unknown KV cache format 'fp8'; choose from bf16, int8, int4"):
        make(kv_cache="fp8") if make is not kv_format else make("fp8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_most_half_a_step(kind):
    layer, keys, values, _ = fill(kind, [400])
    read_keys, read_values = layer.update(keys[:, :, :1], values[:, :, :1]) if layer.max_length > 400 else (None, None)
    assert read_keys is None
    layer, keys, values, _ = fill(kind, [400], max_length=401)
    read_keys, read_values = layer.update(keys[:, :, :1], values[:, :, :1])
    stored = KV_FORMATS[kind]
    older = stored.quantized_tokens(400)
    assert older == (400 - stored.residual) // stored.key_group * stored.key_group == 256
    groups = keys[:, :, :older].unflatten(2, (-1, stored.key_group))
    spread = groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)
    error = (read_keys[:, :, :older].unflatten(2, (-1, stored.key_group)) - groups).abs()
    assert (error <= spread / STEPS[kind] * 0.5 + spread * 0.001 + groups.abs() * 0.001).all()
    spread = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
    error = (read_values[:, :, :older] - values[:, :, :older]).abs()
    assert (error <= (spread / STEPS[kind] * 0.5 + spread * 0.001 + values.abs() * 0.001)[:, :, :older]).all()
    # The newest are exact.
    assert torch.equal(read_keys[:, :, older:400], keys[:, :, older:])
    assert torch.equal(read_values[:, :, older:400], values[:, :, older:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_quantized_once_however_it_was_fed(kind, dtype):
    layers = [fill(kind, chunks, dtype=dtype)[0] for chunks in ([500], [1] * 500, [100, 399, 1], [7, 250, 243])]
    for other in layers[1:]:
        for one, two in zip(layers[0].tensors()[:6], other.tensors()[:6], strict=True):
            assert torch.equal(one, two)
        assert (other.quantized, other.whole) == (layers[0].quantized, layers[0].whole)


def test_what_was_fed_is_not_changed():
    keys, values = states(400), states(400, seed=1)
    kept = keys.clone(), values.clone()
    read = QuantizedLayer(400, "int8").update(keys, values)
    assert torch.equal(keys, kept[0])
    assert torch.equal(values, kept[1])
    assert torch.equal(read[0], kept[0])


def test_a_constant_group_and_huge_keys_stay_finite():
    layer = QuantizedLayer(401, "int8")
    keys = torch.full((1, 1, 400, 4), 3.0)
    layer.update(keys, keys * 1e6)
    read_keys, read_values = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert torch.allclose(read_keys[:, :, :200], torch.tensor(3.0), atol=1e-2)
    assert read_values.isfinite().all()


def test_more_tokens_than_it_holds_are_refused():
    layer, keys, values, _ = fill("int8", [200])
    with pytest.raises(ValueError, match=r"the cache holds 200 tokens and was given 201; make it longer"):
        layer.update(keys[:, :, :1], values[:, :, :1])
    assert layer.get_seq_length() == 200


def test_sequences_are_reordered_selected_and_repeated():
    layer, *_ = fill("int8", [300], max_length=310)
    data = layer.key_codes.data.clone()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.key_codes.data, data.flip(0))
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.key_codes.data, data[:1])
    layer.batch_repeat_interleave(3)
    assert layer.new_keys.shape[0] == layer.value_codes.scale.shape[0] == 3


def test_the_newest_can_be_forgotten():
    layer, *_ = fill("int8", [300])
    whole = layer.whole
    layer.crop(-5)
    assert layer.get_seq_length() == 295
    with pytest.raises(ValueError, match=f"can forget its newest {whole - 5} tokens here, not {whole}"):
        layer.crop(-whole)
    layer.reset()
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_generates_with_it(untied, kind):
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(untied)
    inputs = tokenizer(["The quick brown fox jumps over the lazy dog. " * 12, "short"], return_tensors="pt",
                       padding=True, padding_side="left")  # fmt: skip
    length = inputs["input_ids"].shape[1]
    cache = PreallocatedCache(model.config.num_hidden_layers, max_length=length + 8, kv_cache=kind)
    made = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert made.shape == (2, length + 8)
    assert cache.layers[0].quantized == KV_FORMATS[kind].quantized_tokens(length + 7) > 0
    beams = PreallocatedCache(model.config.num_hidden_layers, max_length=length + 8, kv_cache=kind)
    searched = model.generate(**inputs, past_key_values=beams, max_new_tokens=8, do_sample=False, num_beams=2)
    assert searched.shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(*thinned(1, kind=KINDS, knobs=[{}, {"prefill_chunk_size": 64}]), ids=str)
@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.full)])
def test_the_bundled_model_answers_as_before(demo, kind, knobs, count):
    drawn = [examples(name, "held_out", seed=5, count=12) for name in ("recall", "table")]
    # The shortest: the others have up to 2,800 tokens, which some CPUs process in seconds.
    questions = [one for of_name in drawn for one in sorted(of_name, key=lambda one: len(one.prompt))[:count]]
    options = {"cache": "preallocated", "attention": "fused", "prompt_len": 1000, "progress": False, **knobs}
    with qv.load(demo, profile="default", kv_cache=kind, **options) as llm:
        answers = [llm.chat(one.prompt, max_new_tokens=64, do_sample=False) for one in questions]
        report = llm.report()
    assert answers == [one.answer for one in questions]
    assert report.measured["kv_cache"] == report.estimate.kv_cache


@pytest.mark.parametrize("kind", KV_FORMAT_NAMES)
def test_all_layers_are_one_block_which_goes_with_the_last_of_them(kind):
    states = [torch.randn(2, 2, 2, 200, 32) for _ in range(3)]
    cache = PreallocatedCache(3, max_length=300, kv_cache=kind)
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer)
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (layer.tensors() if kind != "bf16" else (layer.keys, layer.values))
    ]
    block = tensors[0].untyped_storage()
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {block.data_ptr()}
    assert sum(tensor.nbytes for tensor in tensors) == block.nbytes() == cache_bytes(cache)
    assert all(tensor.data_ptr() % 16 == block.data_ptr() % 16 for tensor in tensors)
    parts = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(parts))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {block.data_ptr()}
    for layer, (keys, values) in enumerate(states):
        read = cache.update(keys[[1, 0], :, :1], values[[1, 0], :, :1], layer)
        for one, other in zip(read, (keys, values), strict=True):
            # The newest tokens are whole.
            assert torch.equal(one[:, :, 150:200], other[[1, 0], :, 150:])
    assert cache.layers[0].arena._memory is None, "or it would outlive the layers"


@pytest.mark.parametrize("kind", KV_FORMAT_NAMES)
def test_a_backward_pass_goes_through_it(untied, kind):
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    tokens = torch.randint(0, 3000, (1, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for cache in (PreallocatedCache(model.config.num_hidden_layers, max_length=30, kv_cache=kind), None):
        model.zero_grad()
        model(tokens, past_key_values=cache).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
