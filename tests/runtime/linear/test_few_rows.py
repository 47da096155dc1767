"""Products of a few rows with quantized matrices, held against float64 products of the dequantized matrix.

Where there is no GPU Triton's interpreter runs the kernels, if the process was started with TRITON_INTERPRET=1.
"""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional

from qwen_vram.runtime.linear import few_rows
from qwen_vram.runtime.linear.int4 import Int4Linear, encode
from qwen_vram.runtime.linear.int4_packing import unpack_tiles, unpair
from qwen_vram.runtime.linear.int8_fp8 import Fp8Linear, Int8Linear

bnb = pytest.importorskip("bitsandbytes")

# NumPy warns of how Triton's interpreter (3.6) reads scalars.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

FORMATS = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8-wo", "fp8", "int4", "dense")
# Rows of x, the matrix, and a bias or none.
SHAPES = {
    "": ((1, (7, 576), True), (3, (4, 2112), False), (8, (5, 64), True), (2, (8, 192), False)),
    "int4": ((1, (48, 640), True), (3, (16, 2176), False), (8, (32, 128), True), (2, (80, 256), False)),
}
INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton with TRITON_INTERPRET=1 is not here")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
# Triton's interpreter cuts float32 to bf16 where a GPU rounds it.
DTYPES = {"cpu": (torch.float16,), "cuda": (torch.float16, torch.bfloat16)}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    if INTERPRETED:
        from qwen_vram.runtime.linear import few_rows_kernels

        monkeypatch.setattr(few_rows, "kernels_for", lambda device, storage: few_rows_kernels)
        monkeypatch.setattr(few_rows, "_LOOKUP", "load")  # the others are PTX


def made(weights, rows, width, dtype, device, *, bias=False, seed=0):
    """A layer in a format, and its matrix in float64."""
    if weights == "int4" and device == "cpu":
        pytest.skip("the kernel for int4 is PTX")
    torch.manual_seed(seed)
    plain = nn.Linear(width, rows, bias=bias, dtype=dtype)
    if weights == "dense":
        return plain.to(device), plain.weight.to(device).double()
    if weights in ("int8-wo", "fp8"):
        kind = Int8Linear if weights == "int8-wo" else Fp8Linear
        layer = copy.deepcopy(plain)
        kind.adopt(layer, stored=False)
        for name, tensor in kind.quantize(plain.weight.data).items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor)
        layer = layer.to(device)
        codes = layer.weight if weights == "int8-wo" else layer.weight.view(torch.float8_e4m3fn).float()
        return layer, codes.double() * layer.scale.double()[:, None]
    if weights == "int4":
        return made_int4(plain, device)
    nested = not weights.endswith("plain")
    kind = weights.removesuffix("-plain")
    layer = bnb.nn.Linear4bit(width, rows, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(dtype).to("cpu").to(device)
    state = layer.weight.quant_state
    absmax = state.absmax
    if nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = layer.weight.view(-1)
    values = state.code.double()[torch.stack((packed >> 4, packed & 15), 1).int()].view(-1, 64)
    return layer, (values * absmax.double()[:, None]).view(rows, width)


def made_int4(plain, device):
    """Return a layer in int4 with codes in the order of a GPU, and its matrix in float64."""
    rows, width = plain.weight.shape
    layer = copy.deepcopy(plain)
    Int4Linear.adopt(layer, stored=False)
    pairs, levels = encode(plain.weight.data.float())
    codes = unpair(pairs).double().view(rows, -1, 128) - 8
    layer.scales_and_zeros = (
        torch.stack((levels.scale[..., 0].t(), levels.zero[..., 0].t()), -1).bfloat16().contiguous()
    )
    layer.weight = nn.Parameter(tiles(pairs), requires_grad=False)
    check = torch.empty(rows, width, dtype=torch.int8)
    unpack_tiles(layer.weight.data, check)
    assert torch.equal(check.double().view_as(codes), codes)
    return layer.to(device), (codes * levels.scale.double() + levels.zero.double()).view(rows, width).to(device)


def tiles(pairs):
    """Return pairs of codes in the order of `unpack_tiles`."""
    codes = unpair(pairs).view(-1, 8, pairs.shape[1] // 64, 4, 2, 2, 4, 2)  # tile, row, block, j, a, b, c, odd
    nibbles = codes.permute(0, 2, 1, 6, 3, 7, 4, 5).contiguous()  # tile, block, row, c, j, odd, a, b
    return (nibbles[..., 0] | nibbles[..., 1] << 4).flatten().view(torch.int32).view(len(codes), -1, 32, 4)


def check(found, x, matrix, bias):
    """At most the error of torch's product with the dequantized matrix, and the rounding of the result."""
    exact = x.double() @ matrix.t()
    torchs = (functional.linear(x, matrix.to(x.dtype)).double() - exact).abs().max()
    if bias is not None:
        exact = exact + bias.double()
    rounding = exact.abs().max() * torch.finfo(x.dtype).eps / 2
    assert found.dtype == x.dtype
    assert (found.double() - exact).abs().max() <= torchs + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", FORMATS)
@torch.inference_mode()
def test_products_are_those_of_the_dequantized_matrix(weights, device):
    for rows, (out, width), bias in SHAPES["int4" if weights == "int4" else ""]:
        if weights == "dense" and rows > 1:
            continue
        for dtype in DTYPES[device]:
            layer, matrix = made(weights, out, width, dtype, device, bias=bias)
            x = torch.randn(rows, width, dtype=dtype, device=device)
            found = few_rows.multiply(layer, x)
            check(found, x, matrix, layer.bias)
            assert torch.equal(found, few_rows.multiply(layer, x))
            added = torch.randn(rows, out, dtype=dtype, device=device)
            assert torch.equal(few_rows.multiply(layer, x, added), found + added)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["nf4", "int8-wo", "fp8", "int4"])
@torch.inference_mode()
def test_groups_are_what_their_matrices_are_alone(weights, device):
    dtype = torch.float16
    times, width = (16, 640) if weights == "int4" else (1, 576)
    layers = [made(weights, times * out, width, dtype, device, bias=True, seed=out)[0] for out in (7, 5, 4)]
    x = torch.randn(2, width, dtype=dtype, device=device)
    for some in (layers, layers[:2]):
        for product, layer in zip(few_rows.multiply_each(some, x), some):
            assert torch.equal(product, few_rows.multiply(layer, x))
            assert torch.equal(few_rows.multiply_each(some, x[:1])[0], few_rows.multiply(some[0], x[:1]))
    gate, up = (made(weights, 7 * times, width, dtype, device, seed=seed)[0] for seed in (1, 2))
    expected = functional.silu(few_rows.multiply(gate, x[:1])) * few_rows.multiply(up, x[:1])
    torch.testing.assert_close(few_rows.swiglu(gate, up, x[:1]), expected)
    assert few_rows.swiglu(gate, up, x) is None


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_what_the_kernels_do_not_know_is_left_to_others(device):
    layer, _ = made("nf4", 8, 128, torch.float16, device)
    x = torch.randn(9, 128, dtype=torch.float16, device=device)
    assert few_rows.multiply(layer, x[:8]) is not None
    assert few_rows.multiply(layer, x) is None
    assert few_rows.multiply(layer, x[:2].float()) is None
    assert few_rows.multiply(layer, x[:4].t().contiguous().t()) is None
    state = layer.weight.quant_state
    state.code = state.code.to(torch.bfloat16)  # as bitsandbytes makes it if bf16 is torch's default dtype
    assert few_rows.multiply(layer, x[:1]) is None
    dense = nn.Linear(128, 8, dtype=x.dtype, device=device)
    assert few_rows.multiply(dense, x[:1]) is not None
    assert few_rows.multiply(dense, x[:2]) is None
    dense.register_forward_hook(lambda *seen: None)
    assert few_rows.multiply(dense, x[:1]) is None
    assert few_rows.multiply(nn.Bilinear(128, 128, 8).to(x), x[:1]) is None
    odd, _ = made("int8-wo", 8, 72, torch.float16, device)
    assert few_rows.multiply(odd, torch.randn(1, 72, dtype=torch.float16, device=device)) is None
    other, _ = made("fp4", 8, 128, torch.float16, device)
    assert few_rows.multiply_each((layer, other), x[:1]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", ["load", "shuffle", "permute"])
@pytest.mark.parametrize("weights", ["nf4", "fp4"])
@torch.inference_mode()
def test_every_look_up_and_a_captured_product(weights, lookup, monkeypatch):
    monkeypatch.setattr(few_rows, "_LOOKUP", lookup)
    layer, matrix = made(weights, 515, 3584, torch.bfloat16, "cuda")
    x = torch.randn(1, 3584, dtype=torch.bfloat16, device="cuda")
    alone = few_rows.multiply(layer, x)
    check(alone, x, matrix, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = few_rows.multiply(layer, x)
    graph.replay()
    assert torch.equal(captured, alone)
