"""Products of up to 64 rows with 4-bit matrices on a GPU, held against the dequantized matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_vram.arithmetic.tiling import MANY_ROWS, by_many_rows
from qwen_vram.runtime.linear import many_rows

SHAPES = [(512, 896), (200, 128), (4864, 896), (896, 4864)]


def test_the_rows_and_columns_of_the_kernel():
    least, most = MANY_ROWS
    assert [by_many_rows(rows, 896) for rows in (least - 1, least, most, most + 1)] == [False, True, True, False]
    assert not by_many_rows(8, 192)


def test_other_matrices_and_devices_have_no_kernel():
    with torch.inference_mode():
        assert many_rows.multiply_each((nn.Linear(128, 64),), torch.zeros(8, 128, dtype=torch.bfloat16)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 5, 8, 17, 33, 64])
@torch.inference_mode()
def test_on_a_gpu_products_are_those_of_the_dequantized_matrix(quant_type, nested, dtype, rows):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    for out, width in SHAPES:
        linear = bnb.nn.Linear4bit(
            width, out, bias=rows % 2 == 0, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type
        )
        linear = linear.to(dtype).cuda()
        x = torch.randn(rows, width, dtype=dtype, device="cuda")
        added = torch.randn(rows, out, dtype=dtype, device="cuda")
        matrix = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state).to(dtype)
        expected = x.double() @ matrix.double().T
        if linear.bias is not None:
            expected += linear.bias.double()
        found = many_rows.multiply_each((linear, linear), x)
        assert found is not None
        assert torch.equal(*found)
        # A rounding of the result, and of the sums in float32.
        allowed = torch.finfo(dtype).eps * expected.abs().max() + 1e-5 * width**0.5
        assert (found[0].double() - expected).abs().max() <= allowed
        (summed,) = many_rows.multiply_each((linear,), x, added)
        assert torch.equal(summed, found[0] + added)
