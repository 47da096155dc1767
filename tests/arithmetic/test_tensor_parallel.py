"""The part of a model on one of several GPUs: its weights sum to the model, and equal those of a vLLM worker."""

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.kv_cache import kv_bytes_per_token
from qwen_vram.arithmetic.tensor_parallel import shard, sizes_of
from qwen_vram.arithmetic.weights import weight_bytes
from qwen_vram.fleet.card_memory import served
from qwen_vram.planning.vllm.workers import Workers
from qwen_vram.planning.vllm.workers import weight_bytes as worker_bytes
from qwen_vram.spec.catalog import find
from qwen_vram.spec.profile import Profile


@pytest.mark.parametrize("name", ["Qwen2.5-7B-Instruct", "Qwen2.5-72B-Instruct", "Qwen3-0.6B", "Qwen3-32B"])
@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_a_part_has_the_weights_of_a_worker(name, weights):
    architecture, profile = find(name), Profile(weights=weights)
    for size in sizes_of(architecture, 8):
        part = shard(architecture, size)
        worker = worker_bytes(served(architecture, profile), Workers(size, 1, 1))
        assert worker == weight_bytes(part, profile).device


@pytest.mark.parametrize(("name", "size"), [("Qwen2.5-7B-Instruct", 4), ("Qwen2.5-72B-Instruct", 8)])
def test_parts_sum_to_the_model(name, size):
    """Norms are on every GPU. These divisions share no key-value head, whose biases would be on several too."""
    whole, part = find(name), shard(find(name), size)
    norms = sum(weight.numel for weight in whole.weights() if weight.role == "norm")
    assert size * part.num_parameters - (size - 1) * norms == whole.num_parameters
    assert size * kv_bytes_per_token(part, Profile()) == kv_bytes_per_token(whole, Profile())


def test_a_key_value_head_that_several_gpus_need_is_on_each():
    whole = find("Qwen2.5-1.5B-Instruct")  # 12 heads, 2 key-value heads
    assert sizes_of(whole, 8) == [1, 2, 4]
    assert kv_bytes_per_token(shard(whole, 4), Profile()) == kv_bytes_per_token(shard(whole, 2), Profile())


def test_a_division_that_does_not_divide_the_heads_is_refused():
    expected = (
        r"tensor_parallel 8 does not divide the model's 28 heads, 4 key-value heads and inner size 18944; .*1, 2, 4$"
    )
    with pytest.raises(qv.WorkloadError, match=expected) as refused:
        shard(find("Qwen2.5-7B-Instruct"), 8)
    assert (refused.value.name, refused.value.got) == ("tensor_parallel", 8)
