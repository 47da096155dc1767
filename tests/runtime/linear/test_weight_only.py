"""int4, int8-wo and fp8 on torch's own operators: codes, products, what is refused, and what a GPU makes of it."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import qwen_vram as qv
from qwen_vram.arithmetic import tiling as tiles
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.linear import int8_fp8
from qwen_vram.runtime.linear.int4 import Int4Linear
from qwen_vram.runtime.linear.int4_levels import codes, fit
from qwen_vram.runtime.linear.int4_packing import arrange, pair, unpack, unpack_tiles
from qwen_vram.runtime.linear.int8_fp8 import Fp8Linear, Int8Linear
from qwen_vram.runtime.measure import weight_storages
from qwen_vram.spec.catalog import CATALOG
from tests.helpers.tiers import thinned

LINEARS = {cls.format: cls for cls in (Int4Linear, Int8Linear, Fp8Linear)}
WEIGHTS = tuple(LINEARS)
QUESTIONS = [example for name in ("math", "code", "table") for example in examples(name, "held_out", seed=7, count=3)]
# Mean KL divergence from bf16 over prompts and answers, in nats: half as much again as was measured on a CPU.
FAR = {"int4": 0.058, "int8-wo": 0.001, "fp8": 0.005}


def load(model, **knobs):
    return qv.load(model, profile=knobs.pop("profile", "default"), progress=False, **knobs)


def quantized(weights, rows=336, columns=768, *, bias=True, device="cpu", seed=0):
    """A layer in a format, and the plain one that it was made of."""
    torch.manual_seed(seed)
    plain = nn.Linear(columns, rows, bias=bias, dtype=torch.bfloat16, device=device)
    layer = copy.deepcopy(plain)
    LINEARS[weights].adopt(layer, stored=False)
    for name, tensor in layer.quantize(plain.weight.data).items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor)
    return layer, plain


def matrix(layer):
    with torch.no_grad():
        return layer.dequantize(0, layer.out_features, torch.bfloat16)


def int8_kernel(monkeypatch):
    """Count the calls of torch's kernel for int8 on a CPU."""
    calls = []
    real = int8_fp8._pack_mm
    monkeypatch.setattr(int8_fp8, "_pack_mm", lambda *tensors: calls.append(len(tensors[0])) or real(*tensors))
    return calls


@pytest.mark.parametrize("fast", [False, True])
@torch.inference_mode()
def test_int8_products_on_the_cpu_are_those_of_codes_and_scales(monkeypatch, fast):
    """With instructions for bf16, tiles multiply more than eight rows."""
    calls = int8_kernel(monkeypatch)
    monkeypatch.setattr(int8_fp8, "_multiplies_bf16", lambda: fast)
    layer, _ = quantized("int8-wo", rows=35, columns=752)
    exact = layer.weight.double() * layer.scale.double()[:, None]
    for rows in (1, 3, 8, 9, 70):
        x = torch.randn(2, rows, 752, dtype=torch.bfloat16)[1]
        product = x.double() @ exact.t() + layer.bias.double()
        # Half a unit of the result, twice: of the product, and of the sum with the bias; tiles also round the matrix.
        bound = product.abs().max() * 2**-7 + (0.02 if fast and rows > 8 else 0)
        assert (layer(x).double() - product).abs().max() <= bound
    assert calls == ([1, 3, 8] if fast else [1, 3, 8, 9, 70])


@torch.inference_mode()
def test_codes_and_inputs_at_any_address_are_multiplied(monkeypatch):
    """The kernel ends the process if an address is no multiple of 16."""
    calls = int8_kernel(monkeypatch)
    layer, _ = quantized("int8-wo", rows=32, columns=256, bias=False)
    memory = torch.empty(32 * 256 + 8, dtype=torch.int8)
    x = torch.randn(2 * 256 + 4, dtype=torch.bfloat16)[4:].view(2, 256)
    expected = layer(x.clone())
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.t().contiguous().t()), expected)
    misplaced = memory[8:].view(32, 256).copy_(layer.weight)
    layer.weight = nn.Parameter(misplaced, requires_grad=False)
    assert calls == [2, 2, 2]
    torch.testing.assert_close(layer(x), expected, rtol=2**-6, atol=2**-6)  # by tiles
    assert calls == [2, 2, 2]
    layer.restore()
    assert torch.equal(layer(x), expected)
    assert calls == [2, 2, 2, 2]
    odd, _ = quantized("int8-wo", rows=32, columns=40, bias=False)
    assert odd(torch.randn(1, 40, dtype=torch.bfloat16)).isfinite().all()
    assert len(calls) == 4


# the whole model


@pytest.fixture(scope="module")
def plain(demo):
    """Questions with their answers as texts, and what the model in bf16 makes of each."""
    with load(demo) as llm:
        texts = [chat(llm, example) + example.answer for example in QUESTIONS]
        return texts, [log_probabilities(llm, text) for text in texts]


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize(*thinned(1, weights=WEIGHTS, head=[False, True], embeddings=["device", "host"]))
def test_bytes_answers_and_distance_from_bf16(demo, plain, weights, head, embeddings, step):
    """Of each `step` questions one is answered: of each kind one at least."""
    texts, expected = plain
    with load(demo, weights=weights, lm_head=weights if head else None, embeddings=embeddings) as llm:
        real = weight_storages(llm.model, get_backend(weights))
        assert sum(real.values()) == llm.plan.estimate.weights == llm.report().measured["weights"]
        table = 3072 * 256 * 2
        assert llm.plan.estimate.host == (table if embeddings == "host" else 0)
        kinds = {type(module) for module in llm.model.modules() if isinstance(module, nn.Linear)}
        assert kinds == {LINEARS[weights]} | (set() if head else {nn.Linear})
        assert llm.model.dtype is torch.bfloat16
        distances = [
            (before.exp() * (before - log_probabilities(llm, text))).sum(-1).mean()
            for before, text in zip(expected, texts)
        ]
        assert 0 < torch.stack(distances).mean() < FAR[weights]
        for example in QUESTIONS[::step]:
            assert llm.chat(example.prompt, max_new_tokens=64, do_sample=False) == example.answer


def chat(llm, example):
    turns = [{"role": "user", "content": example.prompt}]
    return llm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def log_probabilities(llm, text):
    return llm.model(**llm.tokenizer(text, return_tensors="pt")).logits[0].float().log_softmax(-1)


SAVERS = [
    {"cache": "preallocated", "attention": "fused"},
    {"cache": "preallocated", "kv_cache": "int8", "prefill_chunk_size": 64},
    {"cache": "preallocated", "kv_device": "host"},
    {"cache": "static", "attention": "sdpa"},
    {"attention": "eager"},
]


@pytest.mark.parametrize(*thinned(1, weights=WEIGHTS, knobs=SAVERS), ids=str)
def test_every_cache_and_attention_answers_right(demo, weights, knobs):
    with load(demo, weights=weights, lm_head=weights, embeddings="host", **knobs) as llm:
        example = examples("recall", "held_out", seed=5, count=1)[0]  # past the tokens that stay in 16 bits
        assert llm.chat(example.prompt, max_new_tokens=64, do_sample=False) == example.answer


@pytest.mark.parametrize("weights", WEIGHTS)
def test_an_adapter_runs_beside_it(untied, adapter, weights):
    """The update is the adapter's own, on whatever base: the same as beside the dequantized matrices."""
    inputs = {"input_ids": torch.arange(3, 40)[None]}
    with load(untied, weights=weights, adapter=adapter) as llm, torch.no_grad():
        layer = llm.model.base_model.model.model.layers[0].self_attn.q_proj
        assert type(layer.base_layer) is LINEARS[weights]
        got = llm.model(**inputs).logits
        for module in llm.model.modules():
            if isinstance(module, LINEARS[weights]):
                dense = matrix(module)
                module.__class__ = nn.Linear
                module.weight = nn.Parameter(dense)
        assert torch.allclose(got, llm.model(**inputs).logits, atol=0.05, rtol=0.05)


# codes


@pytest.mark.parametrize("shape", [(64, 128), (128, 256), (48, 128), (208, 384), (80, 128), (112, 256), (16, 128)])
def test_codes_come_back_from_the_cpus_order(shape):
    stored = torch.randint(0, 16, shape)
    assert torch.equal(unpacked(arrange(pair(stored)), stored), stored)


def unpacked(packed, like, unpack=unpack):
    codes = torch.empty_like(like)
    unpack(packed, codes)
    return codes + 8


# torch chooses its kernels in its first operation: after the fork.
ON_OTHER_CPUS = """
import os
import torch
from qwen_vram.runtime.linear.int4_packing import order_is_known

for capability in ("avx2", "default"):
    if not os.fork():
        os.environ["ATEN_CPU_CAPABILITY"] = capability
        print(torch.backends.cpu.get_cpu_capability(), order_is_known(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_codes_come_back_on_other_cpus():
    found = subprocess.run([sys.executable, "-c", ON_OTHER_CPUS], capture_output=True, text=True, timeout=120)
    assert [line.split()[-1] for line in found.stdout.splitlines()] == ["True", "True"], found.stderr


def test_codes_come_back_from_the_gpus_order():
    stored = torch.randint(0, 16, (24, 256))
    assert torch.equal(unpacked(as_on_a_gpu(stored), stored, unpack_tiles), stored)


def as_on_a_gpu(stored):
    """int4mm.cu's order, written out: which columns lane t of a tile packs into its words."""
    pairs = pair(stored).long()
    rows, columns = stored.shape
    words = torch.zeros((rows // 8, columns // 128, 32, 4), dtype=torch.int64)
    for tile in range(rows // 8):
        for block in range(columns // 128):
            for lane in range(32):
                for word in range(4):
                    first = block * 64 + word * 16 + lane % 4
                    four = [int(pairs[tile * 8 + lane // 4, first + step]) for step in (0, 4, 8, 12)]
                    high = sum((byte & 15) << (16 + 4 * index) for index, byte in enumerate(four))
                    words[tile, block, lane, word] = high | sum((b >> 4) << (4 * i) for i, b in enumerate(four))
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def test_levels_leave_less_than_the_whole_range_does():
    torch.manual_seed(0)
    groups = torch.randn(64, 8, 128)
    levels = fit(groups)
    left = (codes(groups, levels) * levels.scale + levels.zero - groups).square().sum()
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    scale = (high - low) / 15
    plain = (((groups - low) / scale).round() * scale + low - groups).square().sum()
    assert left < 0.89 * plain
    assert torch.equal(levels.error.sum(), fit(groups).error.sum())
    for figures in levels[:2]:  # they are stored as they were reckoned with
        assert torch.equal(figures, figures.bfloat16().float())


@pytest.mark.parametrize(
    "group", [torch.zeros(128), torch.full((128,), -3.0), torch.arange(128.0) % 16, 1e4 * torch.eye(128)[5]]
)
def test_odd_groups(group):
    levels = fit(group)
    found = codes(group, levels) * levels.scale + levels.zero
    assert torch.allclose(found, group, atol=float(group.max() - group.min()) / 30 + 1e-6, rtol=0.004)


@pytest.mark.parametrize(("weights", "step"), [("int8-wo", 1 / 254), ("fp8", 1 / 28)])  # half of the largest
def test_rows_have_a_scale_each(weights, step):
    torch.manual_seed(0)
    plain = torch.randn(48, 256, dtype=torch.bfloat16) * torch.logspace(-6, 3, 48)[:, None].bfloat16()
    plain[7] = 0
    layer, _ = quantized(weights, 48, 256)
    for name, tensor in layer.quantize(plain).items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor)
    left = (matrix(layer).float() - plain.float()).abs().amax(1)
    assert bool((left <= (step + 2**-8) * plain.float().abs().amax(1)).all())  # and rounded to bf16
    assert torch.equal(matrix(layer)[7], plain[7])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_chunks_and_tiles_change_nothing(monkeypatch, weights):
    whole, _ = quantized(weights, 208, 256)
    x = torch.randn(tiles.UNPACK_FROM_ROWS, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = whole(x)
    monkeypatch.setattr(tiles, "_CHUNK_ELEMENTS", 64 * 256)
    monkeypatch.setattr(tiles, "_TILE_ELEMENTS", 64 * 256)
    assert (tiles.chunk_rows(208, 256), tiles.tile_rows(208, 256)) == (64, 64)
    parts, _ = quantized(weights, 208, 256)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor)
    with torch.no_grad():
        assert torch.allclose(parts(x), expected, atol=0.01, rtol=0.01)
    assert torch.equal(matrix(parts), matrix(whole))


def test_a_state_dict_costs_nothing_while_a_model_loads():
    """accelerate takes one of a model on two devices; once it is loaded it has codes as checkpoints have them."""
    layer, _ = quantized("int4")
    assert layer.state_dict()["weight"].data_ptr() == layer.weight.data_ptr()
    layer.loaded = True
    pairs = layer.state_dict()["weight"]
    assert torch.equal(arrange(pairs), layer.weight)
    assert not torch.equal(pairs, layer.weight)


# products


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 768), (3, 5, 768), (191, 768), (192, 768), (2, 150, 768)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_products_are_those_of_the_dequantized_matrix(weights, shape, bias):
    layer, plain = quantized(weights, bias=bias)
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = functional.linear(
            x.float(), matrix(layer).float(), None if plain.bias is None else plain.bias.float()
        )
        assert layer(x).shape == expected.shape
        assert torch.allclose(layer(x).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_products_hold_with_several_threads(weights, times):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rows, columns in ((16, 128), (48, 512), (256, 128), (528, 384)):
            layer, _ = quantized(weights, rows, columns, bias=False)
            x = torch.randn(16, columns, dtype=torch.bfloat16)
            for _ in range(times):
                product = layer(x)
            torch.testing.assert_close(product, x @ matrix(layer).t(), rtol=0.02, atol=0.02)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_codes_from_any_place_of_a_mapped_file(weights):
    """torch's int8 kernel crashes on addresses that are no multiple of 16."""
    made, _ = quantized(weights, bias=False)
    made.loaded = True
    codes = made.state_dict()["weight"]
    file = torch.empty(codes.numel() + 8, dtype=codes.dtype)
    layer = nn.Linear(768, 336, bias=False, dtype=torch.bfloat16, device="meta")
    LINEARS[weights].adopt(layer, stored=True)
    layer.weight = nn.Parameter(file[8:].view_as(codes).copy_(codes), requires_grad=False)
    setattr(layer, layer.scales, getattr(made, made.scales))
    layer.restore()
    x = torch.randn(3, 768, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(x), made(x))


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_pass_through(weights, rows):
    layer, _ = quantized(weights)
    x = torch.randn(rows, 768, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad.float(), matrix(layer).float().sum(0).expand(rows, -1), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_compiler_sees_one_graph(weights):
    layer, _ = quantized(weights)
    x = torch.randn(1, 768, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), layer(x), atol=0.02, rtol=0.02)


# what is counted


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_catalog_model_has_widths_that_are_stored(weights):
    assert all(qv.estimate_vram(name, weights=weights, lm_head=weights).weights for name in CATALOG)


@pytest.mark.parametrize(("weights", "tile_bytes"), [("int4", 2.5), ("int8-wo", 2), ("fp8", 2)])
def test_a_tile_is_counted_beside_a_product_of_many_rows(weights, tile_bytes):
    def up_proj(prompt_len, **knobs):
        moments = qv.estimate_vram("Qwen2.5-7B", prompt_len=prompt_len, cache="preallocated", **knobs).moments
        return {(moment.phase, moment.name): moment.activations for moment in moments}

    for prompt_len, phase in ((512, "prefill"), (64, "prefill"), (512, "decode")):
        key = (phase, "mlp up_proj")
        tile = 4672 * 3584 * tile_bytes
        read = weights == "int4" and (prompt_len == 64 or phase == "decode")
        more = up_proj(prompt_len, weights=weights)[key] - up_proj(prompt_len)[key]
        assert more == (0 if read else tile)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_loading_takes_one_tensor_more(weights):
    """The 7B shape, whose head is the largest tensor."""
    estimate = qv.estimate_vram("Qwen2.5-7B", weights=weights, lm_head=weights, embeddings="host")
    assert estimate.weights < estimate.load_peak < estimate.weights + 152_064 * 3_584 * 2


# refusals

NARROW = {
    "model_type": "qwen2", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3072, "max_position_embeddings": 4096,
}  # fmt: skip


def test_widths_without_whole_groups_are_refused_by_the_estimate_and_so_by_the_plan():
    text = (
        r"'int4' stores matrices whose rows are a multiple of 16 and whose columns are one of 128, got 192 x 192; use"
    )
    for refuse in (qv.estimate_vram, lambda model, **knobs: qv.plan(model, profile="default", vram={}, **knobs)):
        with pytest.raises(qv.ConfigError, match=text):
            refuse(NARROW, weights="int4")
    assert qv.estimate_vram(NARROW, weights="int8-wo").weights > 0
    with pytest.raises(qv.ConfigError, match="got 3,080 x 256"):
        qv.estimate_vram({**NARROW, "hidden_size": 256, "vocab_size": 3080}, weights="int4", lm_head="int4")


def test_a_head_in_a_third_format_is_refused(demo):
    with pytest.raises(
        qv.NotSupportedError,
        match="lm_head='nf4' with weights='int4': a model is quantized to one format; use lm_head='int4', or",
    ):
        load(demo, weights="int4", lm_head="nf4")


def test_int4_says_where_it_cannot_run(demo, monkeypatch):
    actual = torch.backends.cpu.get_cpu_capability()
    other = "AVX2" if actual != "AVX2" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: other)  # codes are then not where they seem
    with pytest.raises(
        qv.BackendUnavailableError, match="weights='int4' cannot run: .* order that .* on this CPU; use"
    ):
        load(demo, weights="int4", device="cpu")
    load(demo, weights="int8-wo", device="cpu").close()
    backend, profile = get_backend("int4"), qv.estimate_vram(demo, weights="int4").profile
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        qv.BackendUnavailableError, match=r"needs a GPU of compute capability 8\.0, got 7\.5; use weights"
    ):
        backend.check(profile, torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(qv.BackendUnavailableError, match="its codes are laid out for NVIDIA's GPUs"):
        backend.check(profile, torch.device("cuda", 0))


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 64, 128, 600])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.inference_mode()
def test_products_on_a_gpu(weights, rows, bias):
    layer, plain = quantized(weights, 5120, 3584, bias=bias, device="cuda")
    x = torch.randn(rows, 3584, dtype=torch.bfloat16, device="cuda")
    expected = functional.linear(x.float(), matrix(layer).float(), None if plain.bias is None else plain.bias.float())
    assert torch.allclose(layer(x).float(), expected, atol=0.03, rtol=0.03)
    on_the_host = LINEARS[weights].quantize(plain.weight.data.cpu())
    scales = getattr(layer, layer.scales).cpu()
    assert (scales == on_the_host[layer.scales]).float().mean() > 0.99  # sums differ in their last bits


@pytest.mark.gpu
@torch.inference_mode()
def test_codes_come_back_from_a_gpu():
    stored = torch.randint(0, 16, (208, 384), device="cuda")
    packed = arrange(pair(stored))
    assert torch.equal(unpacked(packed, stored), stored)
    assert torch.equal(packed.cpu(), as_on_a_gpu(stored.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.inference_mode()
def test_a_decode_step_is_captured_in_a_graph(weights):
    layer, _ = quantized(weights, 5120, 3584, device="cuda")
    x = torch.randn(1, 3584, dtype=torch.bfloat16, device="cuda")
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(18944, 3584), (3584, 18944), (512, 3584)])
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.inference_mode()
def test_a_product_of_many_rows_takes_the_tile_that_is_counted(weights, rows, columns):
    layer, _ = quantized(weights, rows, columns, bias=False, device="cuda")
    x = torch.randn(512, columns, dtype=torch.bfloat16, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product = layer(x)
    tile = tiles.tile_rows(rows, columns) * columns
    expected = product.nbytes + tile * (2.5 if weights == "int4" else 2)
    # The allocator does not split a block where less than 1 MiB would be left of it.
    assert 0 <= torch.cuda.max_memory_allocated() - before - expected < 2 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_model_takes_what_was_promised_on_a_gpu(tmp_path, weights):
    from qwen_vram.tools.accuracy import make_checkpoint

    make_checkpoint("Qwen2.5-0.5B", tmp_path / "model")
    torch._C._cuda_clearCublasWorkspaces()  # those of other tests' streams
    knobs = {"weights": weights, "attention": "fused", "cache": "preallocated", "prompt_len": 2048}
    with load(tmp_path / "model", **knobs) as llm:
        measured, promised = llm.report().measured, llm.plan.estimate
        assert measured["weights"] == promised.weights
        assert measured["load_peak"] == pytest.approx(promised.load_peak, rel=0.01)
        # The table is the largest tensor.
        assert measured["load_peak"] <= measured["weights"] + 151_936 * 896 * 2
        report = llm.probe(max_new_tokens=8)
        assert report.measured["peak_allocated"] == pytest.approx(report.estimate.peak_allocated, rel=0.01)
        llm.save_quantized(tmp_path / "copy", progress=False)
    with load(tmp_path / "copy") as llm:
        measured, promised = llm.report().measured, llm.plan.estimate
        assert measured["weights"] == promised.weights
        assert measured["load_peak"] == pytest.approx(promised.load_peak, rel=0.01)
