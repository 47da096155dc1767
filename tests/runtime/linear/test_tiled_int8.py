"""int8 products in pieces: bitsandbytes' own sums, in memory that does not depend on the data."""

import pytest
import torch

import qwen_vram as qv
from qwen_vram.arithmetic.tiling import int8_rows, int8_tile_elements
from qwen_vram.demo import CHECKPOINT

bnb = pytest.importorskip("bitsandbytes")

OUT, IN = 320, 192


def int8(device="cpu", *, bias=False, out=OUT, inner=IN, threshold=6.0):
    from qwen_vram.runtime.linear.tiled_int8 import multiply_int8_in_pieces

    torch.manual_seed(0)
    linear = bnb.nn.Linear8bitLt(inner, out, bias=bias, has_fp16_weights=False, threshold=threshold)
    module = torch.nn.ModuleList([linear.to(torch.bfloat16)]).to(device).eval()
    multiply_int8_in_pieces(module)
    return module[0]


def inputs(rows, outliers, device="cpu", inner=IN):
    torch.manual_seed(1)
    x = torch.randn(rows, inner).clamp(-3, 3)
    x[torch.randint(rows, (outliers,)), torch.randperm(inner)[:outliers]] = 20.0
    return x.to(torch.bfloat16).to(device)


@pytest.fixture
def small(monkeypatch):
    """Pieces of 100 rows, and tiles of less than all outlier columns."""
    monkeypatch.setattr("qwen_vram.runtime.linear.tiled_int8.int8_rows", lambda *shape: 100)
    monkeypatch.setattr("qwen_vram.runtime.linear.tiled_int8.int8_tile_elements", lambda *shape: 4 * IN)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outliers", [0, 1, 37, IN])
@torch.inference_mode()
def test_a_piece_is_the_product_of_bitsandbytes(small, outliers, bias):
    linear = int8(bias=bias)
    for rows in (1, 64, 100):
        x = inputs(rows, min(outliers, rows * IN))
        expected = bnb.nn.Linear8bitLt.forward(linear, x)
        torch.testing.assert_close(linear(x[None])[0], expected, atol=0, rtol=2**-7)


@torch.inference_mode()
def test_without_a_threshold_nothing_is_an_outlier(small, monkeypatch):
    linear, x = int8(threshold=0.0), inputs(250, 90)
    expected = bnb.nn.Linear8bitLt.forward(linear, x)
    monkeypatch.setattr(bnb.nn.Linear8bitLt, "forward", None)  # it must not be asked
    torch.testing.assert_close(linear(x), expected, atol=0, rtol=2**-7)


@torch.inference_mode()
def test_many_rows_are_pieces_one_after_the_other(small):
    linear, x = int8(), inputs(250, 90)
    pieces = [bnb.nn.Linear8bitLt.forward(linear, x[start : start + 100]) for start in (0, 100, 200)]
    torch.testing.assert_close(linear(x.view(2, 125, IN)).view(250, OUT), torch.cat(pieces), atol=0, rtol=2**-7)


@torch.inference_mode()
def test_an_empty_input_is_left_to_bitsandbytes():
    assert int8()(torch.empty(0, IN, dtype=torch.bfloat16)).numel() == 0


def test_training_through_it_has_gradients():
    x = inputs(10, 3).requires_grad_()
    int8()(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("streamed", [0, 2])
@pytest.mark.parametrize(
    ("dequantization", "kind"), [("whole", "Linear8bitLt"), ("tiled", "TiledLinear8bit"), (None, "TiledLinear8bit")]
)
def test_the_loader_obeys(dequantization, kind, streamed):
    knobs = {"weights": "int8", "dequantization": dequantization, "streamed_layers": streamed}
    with qv.load(CHECKPOINT, profile="default", progress=False, **knobs) as llm:
        matrices = [module for module in llm.model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
        assert len(matrices) == 7 * llm.model.config.num_hidden_layers
        assert {module.forward.__func__.__qualname__ for module in matrices} == {f"{kind}.forward"}


def test_answers_are_those_of_whole_products():
    answers = []
    for dequantization in ("whole", "tiled"):
        with qv.load(
            CHECKPOINT, profile="default", weights="int8", dequantization=dequantization, progress=False
        ) as llm:
            answers.append(llm.chat("What is 12 + 30?", max_new_tokens=16, do_sample=False))
    assert answers[0] == answers[1]


def test_pieces_and_tiles_are_counted():
    whole, tiled = (
        qv.estimate_vram("Qwen2.5-7B", weights="int8", prompt_len=8192, prefill_chunk_size=512, dequantization=one)
        for one in ("whole", "tiled")
    )
    assert tiled.activations < 0.4 * whole.activations
    plan = qv.plan("Qwen2.5-7B", vram="12GiB", prompt_len=8_000, weights="int8")
    assert (plan.profile.weights, plan.profile.tiles) == ("int8", True)


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [0, 40, 3_000])
@torch.inference_mode()
def test_on_a_gpu_memory_is_what_is_counted_whatever_the_data(outliers):
    out, inner, rows = 3_584, 8_192, 2_500
    linear, x = int8("cuda", out=out, inner=inner), inputs(rows, outliers, "cuda", inner)
    step = int8_rows(out, inner)
    expected = [bnb.nn.Linear8bitLt.forward(linear, x[start : start + step]) for start in range(0, rows, step)]
    torch.testing.assert_close(linear(x), torch.cat(expected), atol=2**-6, rtol=2**-6)
    del expected
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear(x)
    peak = torch.cuda.max_memory_allocated() - before
    piece = 2 * step * (out + inner) + 7 * int8_tile_elements(out, inner) + 4 * step
    quantizing = step * (6 * inner + 4)
    assert peak == pytest.approx(2 * rows * out + max(piece, quantizing), abs=2**20)
