"""`kernels="fused"`: the same numbers as `transformers`' own modules, in fewer tensors; and what was counted."""

import logging
from itertools import product

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import qwen_vram as qv
from qwen_vram.runtime.kernels import fused_ops as elementwise
from qwen_vram.runtime.kernels.fused_layers import FusedAttention, FusedLayer, FusedMlp, FusedNorm, fuse_layers
from qwen_vram.spec.catalog import catalog_row
from tests.helpers.exact_replay import exact_replay
from tests.helpers.tiers import thinned

PLAIN = {"profile": "default", "attention": "sdpa", "device": "cpu", "progress": False}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(folder, **knobs):
    """Logits of a batch of two, and what is generated after it, of which one is padded."""
    with qv.load(folder, **{**PLAIN, **knobs}, batch_size=2, prompt_len=40, max_new_tokens=12) as llm:
        torch.manual_seed(1)
        ids = torch.randint(5, llm.model.config.vocab_size, (2, 40), device=llm.model.device)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        with torch.no_grad():
            logits = llm.model(ids, attention_mask=mask).logits
        cache = {} if llm.plan.profile.cache == "dynamic" else {"past_key_values": llm.new_cache(max_length=52)}
        cache = {"cache_implementation": "static"} if llm.plan.profile.cache == "static" else cache
        tokens = llm.model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **cache)
        return logits, tokens


KNOBS = [
    {},
    {"weights": "fp32"},
    {"attention": "fused", "cache": "preallocated", "prefill_chunk_size": 16},
    {"attention": "eager", "cache": "static"},
    {"cache": "preallocated", "kv_cache": "int8"},
    {"weights": "nf4"},
    {"streamed_layers": 2, "host_layers": 1},
]


@pytest.mark.parametrize(*thinned(1, kind=["demo", "qwen3"], knobs=KNOBS), ids=str)
def test_on_the_cpu_nothing_changes_bit_for_bit(request, kind, knobs):
    folder = request.getfixturevalue(kind)
    logits, tokens = run(folder, **knobs)
    found, same = run(folder, **knobs, kernels="fused")
    assert torch.equal(found, logits)
    assert torch.equal(same, tokens)


@pytest.fixture
def llm(demo):
    with qv.load(demo, **PLAIN, kernels="fused") as loaded:
        yield loaded


def test_every_module_of_the_kinds_is_fused(llm):
    layers = llm.model.model.layers
    assert all(isinstance(layer, FusedLayer) and isinstance(layer.self_attn, FusedAttention) for layer in layers)
    assert all(isinstance(layer.mlp, FusedMlp) for layer in layers)
    norms = [module for module in llm.model.modules() if "Norm" in type(module).__name__]
    assert len(norms) == 2 * len(layers) + 1
    assert all(isinstance(norm, FusedNorm) for norm in norms)
    assert type(layers[0]) is type(layers[1])
    assert type(layers[0]).__module__ == "transformers.models.qwen2.modeling_qwen2"


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(
        qv.NotSupportedError, match="transformers' .*qwen2, qwen3, and Linear has none; use kernels='plain'"
    ):
        fuse_layers(nn.Linear(2, 2))


def test_a_class_that_ends_alike_is_left_alone():
    """Qwen3-Next's norm multiplies by one plus its weight, so that the fused kernel would give other numbers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=2, head_dim=16, vocab_size=128))
    model.model.norm = Qwen3NextRMSNorm(64)
    fuse_layers(model)
    assert type(model.model.norm) is Qwen3NextRMSNorm
    assert all(isinstance(layer.input_layernorm, FusedNorm) for layer in model.model.layers)
    fuse_layers(model)  # what is fused already stays as it is
    assert all(type(layer).__mro__.count(FusedLayer) == 1 for layer in model.model.layers)


def test_another_activation_is_refused_by_name():
    shape = {**catalog_row("Qwen3-0.6B").shape._asdict(), "max_position_embeddings": 32_768, "hidden_act": "gelu"}
    with pytest.raises(qv.ConfigError, match="hidden_act 'gelu' is not counted; every Qwen of these kinds has 'silu'"):
        qv.estimate_vram(shape)


def test_what_the_caller_gives_is_left_alone(llm):
    embeddings = llm.model.get_input_embeddings()(torch.arange(20)[None])
    given = embeddings.detach().clone()
    with torch.no_grad():
        llm.model(inputs_embeds=given)
    assert torch.equal(given, embeddings)


def test_states_and_attentions_can_be_asked_for(demo):
    ids = torch.arange(20)[None]
    outputs = []
    for kernels in ("plain", "fused"):
        with qv.load(demo, **{**PLAIN, "attention": "eager"}, kernels=kernels) as llm, torch.no_grad():
            outputs.append(llm.model(ids, output_hidden_states=True, output_attentions=True))
    plain, fused = outputs
    assert len(fused.attentions) == len(fused.hidden_states) - 1 > 0
    assert all(map(torch.equal, fused.attentions, plain.attentions))
    # A layer's result is held while the next one's sums go elsewhere.
    assert all(map(torch.equal, fused.hidden_states, plain.hidden_states))


def test_gradients_and_autocast_take_the_plain_way(demo):
    ids = torch.arange(20)[None]
    found = []
    for kernels in ("plain", "fused"):
        with qv.load(demo, **PLAIN, weights="fp32", kernels=kernels) as llm:
            llm.model(ids).logits.float().logsumexp(-1).sum().backward()
            gradients = [one.grad for one in llm.model.parameters()]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                found.append([*gradients, llm.model(ids).logits])
    assert all(map(torch.equal, *found))


def test_an_adapter_trains_and_runs_beside_it(demo, llm):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llm.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model(torch.arange(20)[None]).logits.sum().backward()
    grown = [one.grad for name, one in model.named_parameters() if "lora_B" in name]
    assert len(grown) == 2 * len(llm.model.model.layers)
    assert all(float(one.abs().sum()) > 0 for one in grown)
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.isfinite().all()


def states(*shape, device="cpu", dtype=torch.bfloat16):
    torch.manual_seed(0)
    return (torch.randn(shape) * 3).to(device, dtype)


def close(found, wanted):
    """Equal on the CPU; on a GPU sums are in another order, which a rounding may show."""
    if not found.is_cuda:
        assert torch.equal(found, wanted)
        return
    exactness = 2 * torch.finfo(found.dtype).eps
    assert torch.allclose(found.double(), wanted.double(), rtol=exactness, atol=exactness / 4)
    assert found.dtype == torch.float32 or (found != wanted).double().mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "width", "dtype"), [*product((1, 77), (128, 896, 3584), (torch.bfloat16,)), (33, 100, torch.float32)]
)
def test_norms(rows, width, dtype, device):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norm = Qwen2RMSNorm(width).to(device, dtype)
    nn.init.normal_(norm.weight)
    x = states(2, rows, width, device=device, dtype=dtype)
    close(elementwise.rms_norm(x, norm.weight.detach(), 1e-6), norm(x).detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1, 4864), (3, 5, 1001)])
def test_the_product_of_the_gate(shape, device):
    gate, up = states(*shape, device=device), states(*shape, device=device).flip(-1).contiguous()
    wanted = nn.functional.silu(gate) * up
    found = elementwise.multiply_silu(gate, up)
    assert found is gate
    close(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "tables"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (14, 2, 64), (3, 3, 96)])
def test_rotary_embedding(heads, kv_heads, head_dim, batch, tables, device):
    query, key = (states(batch, 50, count, head_dim, device=device) for count in (heads, kv_heads))
    angles = states(tables, 50, head_dim // 2, device=device, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    wanted = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    elementwise.rotate(query, key, cos, sin)
    for found, one in zip((query, key), wanted, strict=True):
        close(found, one.transpose(1, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("into", ["total", "part"])
def test_joining(into, device):
    total = states(2, 70, 3, 64, device=device, dtype=torch.float32).transpose(1, 2)
    part = states(2, 96, 3, 64, device=device).transpose(1, 2)[:, :, :70]
    sums, some = (states(2, 3, 70, 1, device=device, dtype=torch.float32) + shift for shift in (0, 4))
    weights = torch.stack([sums, some]).double().softmax(0)
    wanted = total.double() * weights[0] + part.double() * weights[1]
    both = torch.logaddexp(sums.double(), some.double())
    out = total if into == "total" else part
    elementwise.join(total, sums, part, some, out)
    exactness = 2**-20 if into == "total" else 2**-8
    assert torch.allclose(out.double(), wanted, rtol=exactness, atol=exactness)
    assert torch.allclose(sums.double(), both, rtol=1e-5)


def test_without_a_compiler_torch_does_it_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(elementwise, "missing_compiler", lambda: "a C compiler")
    with caplog.at_level(logging.WARNING, logger="qwen_vram"):
        assert elementwise.kernels_on.__wrapped__(torch.device("cuda", 0)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "kernels='fused' without a C compiler: torch's own operators are used, and prefill is slower"
    ]


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-4B"])
@pytest.mark.parametrize("chunk", [None, 1024, 3000])
def test_the_mlp_s_product_takes_no_memory_of_its_own(model, chunk):
    knobs = {"prompt_len": 9_300, "max_new_tokens": 3, "attention": "fused", "cache": "preallocated"}
    plain, fused = (
        qv.estimate_vram(model, **knobs, prefill_chunk_size=chunk, kernels=kernels) for kernels in ("plain", "fused")
    )
    assert (plain.peak_moment.name, fused.peak_moment.name) == ("mlp product", "mlp up_proj")
    saved = plain.peak_moment.activations - fused.peak_moment.activations
    assert saved == (chunk or 9_300) * plain.architecture.layers[0].inner_size * 2


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt_len", [4_608, 5_000, 9_300, 17_400])
@pytest.mark.parametrize("chunk", [512, 1024, 3000])
def test_the_last_layer_has_the_peak_of_all_where_attention_is_joined(chunk, prompt_len, batch_size):
    shape = {**catalog_row("Qwen3-0.6B").shape._asdict(), "max_position_embeddings": 32_768}
    shape["intermediate_size"] = 64  # so that attention decides
    knobs = {"attention": "fused", "kernels": "fused", "cache": "preallocated", "prefill_chunk_size": chunk}
    estimate = qv.estimate_vram(shape, **knobs, prompt_len=prompt_len, batch_size=batch_size, max_new_tokens=2)
    exact = exact_replay(estimate)
    # The output projection holds queries, result and its own result: with few parts to join, that is more.
    assert estimate.peak_moment.name in ("attention kernel", "attention o_proj")
    assert exact.summed == pytest.approx(exact.peak, rel=0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["demo", "qwen3"])
@pytest.mark.parametrize("chunk", [None, 48])
def test_on_a_gpu_tokens_are_plain_ones(request, kind, chunk):
    folder = request.getfixturevalue(kind)
    knobs = {"device": "cuda", "cache": "preallocated", "prefill_chunk_size": chunk}
    exact, _ = run(folder, **knobs, weights="fp32")
    knobs["attention"] = "fused"
    logits, tokens = run(folder, **knobs)
    found, same = run(folder, **knobs, kernels="fused")
    assert elementwise.kernels_on(torch.device("cuda", 0)) is not None
    error, plain = (float((one.float() - exact).abs().mean()) for one in (found, logits))
    assert error <= 1.2 * plain
    assert torch.equal(same, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_on_a_gpu_compiled_steps_go_beside_it(demo, weights):
    knobs = {"device": "cuda", "attention": "fused", "cache": "preallocated", "compiled": True, "weights": weights}
    _, tokens = run(demo, **knobs)
    _, same = run(demo, **knobs, kernels="fused")
    assert torch.equal(same, tokens)


@pytest.mark.gpu
def test_on_a_gpu_nothing_else_is_allocated():
    gate, up = (states(4096, 4864, device="cuda") for _ in range(2))
    query, key = states(1, 4096, 14, 64, device="cuda"), states(1, 4096, 2, 64, device="cuda")
    cos = sin = states(1, 4096, 64, device="cuda")
    weight = states(4864, device="cuda")
    calls = {
        elementwise.multiply_silu: ((gate, up), 0),
        elementwise.rotate: ((query, key, cos, sin), 0),
        elementwise.rms_norm: ((gate, weight, 1e-6), gate.nbytes),
    }
    for call, (arguments, took) in calls.items():
        call(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*arguments)
        assert torch.cuda.max_memory_allocated() - before == took
