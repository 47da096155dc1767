"""4-bit matrices dequantized by tiles: the same products, a tile's memory."""

import gc

import pytest
import torch

import qwen_vram as qv
from qwen_vram.arithmetic import tiling
from qwen_vram.arithmetic.tiling import tile_rows
from qwen_vram.demo import CHECKPOINT

bnb = pytest.importorskip("bitsandbytes")

SHAPE = (8_448, 2_112)  # two tiles, the second one shorter
SMALL = (704, 192)  # the same of `small_tiles`
FORMATS = {"nf4": ("nf4", True), "nf4-plain": ("nf4", False), "fp4": ("fp4", True)}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "_TILE_ELEMENTS", 512 * SMALL[1])


def tiled(weights, device, *, shape=SHAPE, bias=False):
    from qwen_vram.runtime.linear.tiled_4bit import dequantize_in_tiles

    kind, nested = FORMATS[weights]
    torch.manual_seed(0)
    whole = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=bias, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type=kind
    )
    module = torch.nn.ModuleList([whole.to(torch.bfloat16)]).to(device).eval()
    dequantize_in_tiles(module)
    module[0].support_avx512bf16_for_cpu = False  # or bitsandbytes repacks the weights and keeps the product to itself
    return module[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", FORMATS)
@torch.inference_mode()
def test_a_product_by_tiles_is_the_product(weights, bias, small_tiles, monkeypatch):
    linear = tiled(weights, "cpu", shape=SMALL, bias=bias)
    assert SMALL[0] // 2 < tile_rows(*SMALL) < SMALL[0]
    x = torch.randn(2, 40, SMALL[1], dtype=torch.bfloat16)
    whole = bnb.nn.Linear4bit.forward(linear, x)
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", None)  # it must not be asked
    torch.testing.assert_close(linear(x), whole)


@torch.inference_mode()
def test_few_rows_are_left_to_bitsandbytes(small_tiles):
    linear = tiled("nf4", "cpu", shape=SMALL)
    x = torch.randn(1, 5, SMALL[1], dtype=torch.bfloat16)
    assert torch.equal(linear(x), bnb.nn.Linear4bit.forward(linear, x))


def test_training_through_a_tiled_matrix_has_gradients(small_tiles):
    linear = tiled("nf4", "cpu", shape=SMALL)
    x = torch.randn(70, SMALL[1], dtype=torch.bfloat16, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("streamed", [0, 2])
@pytest.mark.parametrize("dequantization", ["whole", "tiled"])
def test_the_loader_obeys(dequantization, streamed):
    knobs = {"weights": "nf4", "dequantization": dequantization, "streamed_layers": streamed}
    with qv.load(CHECKPOINT, profile="default", progress=False, **knobs) as llm:
        matrices = [module for module in llm.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        # accelerate's hooks, once taken off, leave the forward of the class before.
        assert {module.forward.__func__ for module in matrices} == {type(matrices[0]).forward}
    assert type(matrices[0]).__name__ == ("TiledLinear4bit" if dequantization == "tiled" else "Linear4bit")


def test_resident_layers_beside_streamed_ones_go_by_tiles_too():
    knobs = {"weights": "nf4", "dequantization": "tiled", "streamed_layers": 2}
    with qv.load(CHECKPOINT, profile="default", **knobs, progress=False) as llm:
        linears = [module for module in llm.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(linears) == 7 * llm.model.config.num_hidden_layers
        # accelerate's hooks leave a forward of the class that was on each module.
        assert {module.forward.__func__.__qualname__ for module in linears} == {"TiledLinear4bit.forward"}


def test_tiles_are_counted():
    both = [
        qv.estimate_vram("Qwen2.5-7B", weights="nf4", prefill_chunk_size=512, cache="preallocated", **knobs)
        for knobs in ({"dequantization": "whole"}, {"dequantization": "tiled"})
    ]
    whole, by_tiles = (estimate.activations for estimate in both)
    # A matrix of the MLP in 16 bits against 4,672 of its 18,944 rows, and one copy of its block maxima less.
    assert whole - by_tiles == pytest.approx((18_944 - 4_672) * 3_584 * 2 + 18_944 * 3_584 // 64 * 4, rel=0.02)


def test_an_unknown_way_is_refused():
    with pytest.raises(
        qv.UnknownNameError, match="unknown dequantization in profile 'halves'; choose from whole, tiled"
    ):
        qv.estimate_vram("Qwen2.5-7B", dequantization="halves")


@pytest.mark.gpu
@pytest.mark.parametrize("weights", FORMATS)
@torch.inference_mode()
def test_on_a_gpu_the_same_bits_in_a_tile_more(weights):
    linear = tiled(weights, "cuda")
    x = torch.randn(512, SHAPE[1], dtype=torch.bfloat16, device="cuda")
    whole = bnb.nn.Linear4bit.forward(linear, x)
    torch.cuda.synchronize()
    gc.collect()  # or memory of an earlier test is freed during the product
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product = linear(x)
    peak = torch.cuda.max_memory_allocated() - before
    assert torch.equal(product, whole)
    maxima = 0 if weights == "nf4-plain" else SHAPE[0] * SHAPE[1] // 64 * 4
    # Up to 1 MiB stays with a block that torch's allocator does not split: 121,856 bytes for nf4 on an H100.
    assert peak == pytest.approx(product.nbytes + tile_rows(*SHAPE) * SHAPE[1] * 2 + maxima, abs=2**20)
