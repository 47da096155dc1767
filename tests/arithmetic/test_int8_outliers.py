"""int8's outlier columns, against a sampled gated product and against columns counted on a GPU."""

import random
from math import exp, sqrt

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.int8_outliers import outlier_columns
from qwen_vram.spec.catalog import find

LINEARS = find("Qwen2.5-7B").layers[0].linears


def test_the_share_is_that_of_sampled_products():
    draw = random.Random(0)
    deviation = 0.02 * sqrt(3584)
    count = 400_000
    hits = 0
    for _ in range(count):
        gate, up = draw.gauss(0, deviation), draw.gauss(0, deviation)
        hits += abs(gate / (1 + exp(-gate)) * up) >= 6
    assert outlier_columns(LINEARS["down_proj"], 1) == pytest.approx(18_944 * hits / count, rel=0.1)


@pytest.mark.parametrize(("rows", "counted"), [(512, 11_066), (2048 * 4, 18_944)])
def test_columns_counted_on_a_gpu(rows, counted):
    # Most in any of four layers; NVIDIA H100, torch 2.11.0, bitsandbytes 0.50.2, 2026-11-24, allocations recorded.
    assert outlier_columns(LINEARS["down_proj"], rows) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])
def test_normed_inputs_have_none(module):
    assert outlier_columns(LINEARS[module], 8192) == 0


def test_they_are_in_the_estimate():
    short = qv.estimate_vram("Qwen2.5-7B", weights="int8", dequantization="whole", prompt_len=512)
    plain = qv.estimate_vram("Qwen2.5-7B", weights="bf16", prompt_len=512)
    # Nine bytes for each outlier column's weights: the int8 column and two float32 copies of it.
    assert short.activations - plain.activations > 9 * 11_000 * 3584 * 0.8
