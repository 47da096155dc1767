"""The allocator's rules one by one, and both consumers of a run's trace against each other."""

import itertools
from dataclasses import replace

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.replay.allocator import CachingAllocator, OverLimitError
from qwen_vram.arithmetic.replay.generation import Generation, replay_generation
from qwen_vram.arithmetic.replay.linear import workspaces
from qwen_vram.arithmetic.replay.load import replay_load
from tests.helpers.exact_replay import exact_replay
from tests.helpers.pairs import all_pairs

KIB, MIB = 2**10, 2**20


def test_small_requests_share_a_segment_of_2_mib():
    allocator = CachingAllocator()
    for _ in range(4096):
        allocator.take(1)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)
    allocator.take(1)
    assert allocator.reserved == 4 * MIB


def test_medium_requests_are_cut_from_20_mib_and_large_ones_get_their_own():
    allocator = CachingAllocator()
    allocator.take(5 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.take(5 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.take(11 * MIB)
    assert allocator.reserved == 32 * MIB


def test_a_rest_of_up_to_1_mib_stays_with_a_large_block():
    allocator = CachingAllocator()
    allocator.give(allocator.take(40 * MIB))
    allocator.take(39 * MIB)
    assert allocator.allocated == 40 * MIB
    allocator = CachingAllocator()
    allocator.give(allocator.take(40 * MIB))
    allocator.take(38 * MIB)
    assert allocator.allocated == 38 * MIB


def test_freed_neighbours_join_and_the_smallest_block_that_fits_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.take(4 * MIB) for _ in range(5)]
    allocator.give(blocks[1], blocks[3])
    allocator.give(blocks[2])
    assert allocator.take(12 * MIB) == blocks[1]
    assert allocator.reserved == 20 * MIB


def test_unused_segments_can_be_released():
    allocator = CachingAllocator()
    kept, given = allocator.take(30 * MIB), allocator.take(50 * MIB)
    allocator.give(given)
    allocator.release_unused()
    assert (allocator.reserved, allocator.allocated, allocator.peak) == (30 * MIB, 30 * MIB, 80 * MIB)
    allocator.give(kept)


def test_a_copy_goes_its_own_way():
    allocator = CachingAllocator()
    block = allocator.take(3 * MIB)
    twin = allocator.copy()
    twin.give(block)
    assert (allocator.allocated, twin.allocated) == (3 * MIB, 0)
    assert twin.take(3 * MIB) == block


def test_under_a_limit_unused_segments_go_back_first():
    allocator = CachingAllocator(limit=100 * MIB)
    small = allocator.take(40 * MIB)
    allocator.give(small, allocator.take(50 * MIB))
    kept = allocator.take(80 * MIB)
    assert (allocator.reserved, allocator.peak) == (80 * MIB, 90 * MIB)
    with pytest.raises(OverLimitError):
        allocator.take(30 * MIB)
    allocator.give(kept)


def test_the_smallest_budget_counts_what_torch_gives_back():
    eager = qv.estimate_vram("Qwen2.5-0.5B", prompt_len=10_149, attention="eager", prefill_chunk_size=512)
    assert eager.peak_allocated < eager.needed_bytes < 0.6 * eager.process_total
    assert eager.fits(eager.needed_bytes)
    assert not eager.fits(eager.needed_bytes - 1)
    fused = qv.estimate_vram("Qwen2.5-0.5B", attention="fused", cache="preallocated")
    assert fused.needed_bytes == fused.process_total


FACTORS = {
    "model": ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-8B"],
    "weights": ["bf16", "fp32", "nf4", "int8", "int4", "int8-wo", "fp8"],
    "knobs": [
        {"attention": "sdpa"},
        {"attention": "eager"},
        {"attention": "fused", "cache": "preallocated"},
        {"attention": "sdpa", "prefill_chunk_size": 512},
        {"attention": "fused", "cache": "preallocated", "prefill_chunk_size": 512, "embeddings": "host"},
        {"attention": "sdpa", "cache": "static", "prefill_chunk_size": 1024},
        {"attention": "fused", "cache": "preallocated", "kv_device": "host"},
        {"attention": "fused", "cache": "static"},
        {"attention": "fused", "cache": "static", "compiled": True},
        {"attention": "fused", "cache": "preallocated", "kv_cache": "int8"},
        {"attention": "fused", "cache": "preallocated", "kv_cache": "int4", "prefill_chunk_size": 512},
        {"attention": "fused", "cache": "preallocated", "kernels": "fused"},
        {"attention": "sdpa", "prefill_chunk_size": 512, "kernels": "fused"},
        {"attention": "eager", "kernels": "fused"},
    ],
    "workload": [{"prompt_len": 2000}, {"prompt_len": 700, "batch_size": 4, "padded": True}, {"logits": "all"}],
}


def is_counted(row):
    """A plain forward has no cache, and LLM.int8 is not compiled."""
    knobs, workload = row.get("knobs", {}), row.get("workload", {})
    return not ("logits" in workload and "cache" in knobs) and not ("compiled" in knobs and row["weights"] == "int8")


PRODUCT = [row for values in itertools.product(*FACTORS.values()) if is_counted(row := dict(zip(FACTORS, values)))]
INDICES = {factor: tuple(range(len(values))) for factor, values in FACTORS.items()}


def both_are_counted(*cells):
    return is_counted({"weights": None} | {factor: FACTORS[factor][at] for factor, at in cells})


# Every knob with every format and model, and every other pair of values.
PAIRS = [{factor: FACTORS[factor][at] for factor, at in row.items()} for row in all_pairs(INDICES, both_are_counted)]


def check_one_layer_has_the_peak_of_all(rows):
    wrong = []
    for row in rows:
        estimate = qv.estimate_vram(
            row["model"], max_new_tokens=8, weights=row["weights"], **row["knobs"], **row["workload"]
        )
        exact = exact_replay(estimate)
        # Not summed up are the logits that the step before left, and what is less than 512 bytes in each tensor.
        left = estimate.workload.batch_size * estimate.architecture.vocab_size * 4
        if not exact.summed <= exact.peak <= exact.summed + left + 100 * 512:
            wrong.append((row, exact))
    assert rows
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("model", FACTORS["model"])
def test_one_layer_and_the_last_steps_have_the_peak_of_all_on_every_pair(model):
    check_one_layer_has_the_peak_of_all([row for row in PAIRS if row["model"] == model])


@pytest.mark.full
@pytest.mark.parametrize("weights", FACTORS["weights"])
@pytest.mark.parametrize("model", FACTORS["model"])
def test_one_layer_and_the_last_steps_have_the_peak_of_all(model, weights):
    check_one_layer_has_the_peak_of_all([row for row in PRODUCT if (row["model"], row["weights"]) == (model, weights)])


def test_a_generation_gives_back_what_it_took():
    estimate = qv.estimate_vram("Qwen2.5-0.5B", prompt_len=300, max_new_tokens=20)
    allocator = replay_load(estimate.architecture, estimate.profile).copy()
    before = allocator.allocated
    replay_generation(allocator, estimate.architecture, estimate.profile, estimate.workload)
    assert allocator.allocated == pytest.approx(
        before + sum(workspaces(estimate.architecture, estimate.profile)), abs=2 * MIB
    )


@pytest.mark.parametrize(
    "knobs",
    [
        {"weights": "bf16", "attention": "eager", "cache": "static", "prefill_chunk_size": 256},
        {"weights": "nf4", "attention": "fused", "cache": "preallocated", "prefill_chunk_size": 512},
        {"weights": "int8", "attention": "sdpa", "cache": "dynamic"},
        {"weights": "int4", "attention": "fused", "cache": "preallocated", "kv_cache": "int4", "kernels": "fused"},
    ],
    ids=lambda knobs: knobs["weights"],
)
@pytest.mark.parametrize("logits", ["last", "all"])
def test_a_layer_from_its_recorded_events_is_the_layer(monkeypatch, knobs, logits):
    known = qv.estimate_vram(
        "Qwen2.5-1.5B", "default", prompt_len=1_000, max_new_tokens=20, batch_size=2, padded=True, **knobs
    )
    workload = replace(known.workload, logits=logits)

    def replayed(limit):
        allocator = CachingAllocator(limit)
        try:
            replay_generation(allocator, known.architecture, known.profile, workload)
        except OverLimitError:
            return None
        return allocator.peak, allocator.peak_reserved, allocator.allocated, allocator.state()

    unlimited = replayed(None)[1]
    limits = (None, unlimited, unlimited - 2**21, unlimited * 15 // 16, unlimited * 7 // 8)
    found = [replayed(limit) for limit in limits]
    monkeypatch.setattr(Generation, "layer_again", Generation.layer)
    assert found == [replayed(limit) for limit in limits]
