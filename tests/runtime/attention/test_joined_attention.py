"""Attention in parts: what one kernel over all keys would give, and what was counted."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import qwen_vram as qv
from qwen_vram.arithmetic.attention import attention_parts, joined_rows
from qwen_vram.runtime.attention import split_kv as joined_attention
from qwen_vram.runtime.attention.fused import fused_attention
from qwen_vram.runtime.attention.split_kv import join, joins


def states(queries, keys, *, heads=4, kv_heads=4, head_dim=32, device="cpu"):
    torch.manual_seed(0)
    query = torch.randn(2, queries, heads, head_dim, device=device).transpose(1, 2)
    key, value = (torch.randn(2, kv_heads, keys, head_dim, device=device) for _ in range(2))
    return [one.bfloat16() for one in (query * 3, key, value)]


def exact(query, key, value):
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1).double() for one in (key, value))
    return scaled_dot_product_attention(query.double(), key, value, attn_mask=seen).transpose(1, 2)


def error(found, wanted):
    return float((found.double() - wanted).abs().mean())


@pytest.mark.parametrize("ends", [[448], [64, 448], [256, 384, 448], [200, 300]])
def test_parts_add_up_to_attention_over_all_keys(ends):
    query, key, value = states(64, 512)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    newest = torch.ones(64, 512 - ends[-1], dtype=torch.bool).tril(448 - ends[-1])

    def parts():
        for start, end in zip([0, *ends], [*ends, 512], strict=True):
            mask = torch.zeros(newest.shape, dtype=query.dtype).masked_fill_(~newest, float("-inf"))
            result, sums = kernel(
                query, key[:, :, start:end], value[:, :, start:end], attn_mask=mask if end == 512 else None
            )
            yield result, sums.unsqueeze(-1)

    found, wanted = join(parts()).transpose(1, 2), exact(query, key, value)
    assert found.dtype == torch.bfloat16
    assert error(found, wanted) <= 3 * error(wanted.bfloat16(), wanted)


def test_few_lengths_are_new():
    seen = {part for past in range(0, 131_073, 512) for part in attention_parts(512, past)}
    assert seen == {4096 << bit for bit in range(6)}
    for past in (4_096, 5_000, 31_744, 100_001):
        parts = attention_parts(1024, past)
        assert past - 4096 < sum(parts) <= past
    assert attention_parts(1000, 31_000) == attention_parts(1, 31_000) == attention_parts(512, 4_095) == ()


def test_an_odd_chunk_is_filled_to_a_power_of_two_where_that_is_near():
    filled = {queries: joined_rows(queries, padded=True) for queries in (1, 300, 512, 600, 700, 1000, 1280, 1536, 3328)}
    assert filled == {1: 0, 300: 0, 512: 512, 600: 0, 700: 1024, 1000: 1024, 1280: 0, 1536: 1536, 3328: 4096}
    assert joined_rows(1000, padded=False) == 0


def test_without_a_gpu_nothing_is_made_in_parts():
    assert not joins(*states(512, 8_704), None)


@pytest.mark.parametrize(
    ("queries", "keys", "padded"),
    [
        (512, 4_608, False),
        (512, 4_700, True),
        (512, 9_728, False),
        (512, 12_800, True),
        *(
            pytest.param(512, keys, padded, marks=pytest.mark.full)
            for keys, padded in ((4_608, True), (4_700, False), (9_728, True), (12_800, False))
        ),
        (700, 5_000, True),
        (1_000, 9_300, True),
        (1_000, 13_400, True),
    ],
)
def test_each_key_is_in_one_part_under_the_mask_that_it_needs(monkeypatch, queries, keys, padded):
    """The kernels are the GPU's; which keys they get is not. Here torch's own in float64 stand in for them."""

    def kernel(query, key, value, scaling, *, causal):
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, 1).double() for one in (key, value))
        scores = query.double() @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        if causal:
            seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            scores = scores.masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ value).float(), scores.logsumexp(-1, keepdim=True).float()

    def flash(query, key, value, scaling):
        result, sums = kernel(query, key, value, scaling, causal=True)
        return result.transpose(1, 2), sums.squeeze(-1)

    monkeypatch.setattr(joined_attention, "_cudnn", kernel)
    monkeypatch.setattr(joined_attention, "flash_attention", flash)
    # The longest ones have fewer heads and one sequence, for the scores of all of them are in memory at once.
    heads = {"heads": 4, "kv_heads": 2} if keys < 9_000 else {"heads": 2, "kv_heads": 1}
    sequences = 2 if keys < 9_000 else 1
    query, key, value = (one[:sequences].float() for one in states(queries, keys, **heads, head_dim=8))
    found = joined_attention.joined_attention(query, key, value, None, padded=padded)
    assert torch.allclose(found.double(), exact(query, key, value), atol=1e-5)


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-4B"])
def test_parts_are_never_what_decides_the_peak(model):
    """So that plans hold on GPUs, too, where torch makes no parts of attention."""
    estimate = qv.estimate_vram(
        model, attention="fused", cache="preallocated", prefill_chunk_size=4096, prompt_len=16_384, max_new_tokens=1
    )
    live = {moment.name: moment.total for moment in estimate.moments if moment.phase == "prefill"}
    assert attention_parts(4096, 12_288)
    assert live["attention kernel"] < live["attention rotary"] <= estimate.peak_moment.total


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (14, 2, 64), (8, 8, 128)])
@pytest.mark.parametrize("keys", [4_608, 9_728, 17_408, 12_800])
def test_on_a_gpu_parts_are_as_exact_as_flash(heads, kv_heads, head_dim, keys):
    shapes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "device": "cuda"}
    query, key, value = states(512, keys, **shapes)
    if torch.cuda.get_device_capability() in ((9, 0), (10, 0)):
        assert joins(query, key, value, None)
    wanted = exact(query, key, value)
    flash = torch.ops.aten._flash_attention_forward(
        *(one.transpose(1, 2) for one in (query, key, value)), None, None, 512, keys, 0.0, True, False
    )[0]
    fused_attention(torch.nn.Module(), query, key, value, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, _ = fused_attention(torch.nn.Module(), query, key, value, None)
    took = torch.cuda.max_memory_allocated() - before
    assert found.is_contiguous()
    assert error(found, wanted) <= 2 * error(flash, wanted)
    if heads == 28:  # for fewer, flash spreads the keys over the GPU, and adds up in buffers of its own
        # The result, as much in float32, and three tensors of log-sum-exps.
        assert took <= found.nbytes + 2 * found.nbytes + 3 * 4 * 2 * heads * 512 + 2**14


@pytest.mark.gpu
def test_on_a_gpu_training_takes_one_kernel():
    query, key, value = states(512, 8_704, head_dim=64, device="cuda")
    value.requires_grad_()
    assert not joins(query, key, value, None)
    fused_attention(torch.nn.Module(), query, key, value, None)[0].float().sum().backward()
    assert value.grad.abs().sum() > 0
