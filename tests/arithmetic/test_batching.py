"""Pages and decode steps of batched requests, by arithmetic, and against the tensors that are allocated."""

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.batching import DRAWN_TOGETHER, batch_step_sizes, packed_tokens, sampling_sizes, step_rows
from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.kv_cache import kv_cache_bytes
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.spec.batching.pages import PAGE, pages_of, pool_pages, pool_tokens
from qwen_vram.spec.machine import DEFAULT
from qwen_vram.spec.profile import resolve_profile
from qwen_vram.spec.workload import Workload
from tests.arithmetic.test_session import smaller

SEVEN = "Qwen2.5-7B-Instruct"
PAGED = {"cache": "paged", "attention": "fused", "kernels": "fused"}
# Model, profile, knobs, and the planned (prompt_len, max_new_tokens, requests).
ROWS = [
    ("Qwen2.5-7B", "default", {"captured": True}, (1_500, 500, 16)),
    ("Qwen2.5-0.5B", "default", {"captured": True}, (700, 64, 100)),
    ("Qwen2.5-1.5B", "default", {"captured": True, "weights": "nf4", "embeddings": "host"}, (1_000, 200, 5)),
    ("Qwen2.5-7B", "compact", {"captured": True, "prefill_chunk_size": 512}, (4_000, 256, 8)),
    ("Qwen3-4B", "default", {"captured": True, "weights": "int8-wo"}, (600, 16, 33)),
    ("Qwen3-0.6B", "default", {"captured": True, "prefill_chunk_size": 100}, (333, 77, 2)),
    ("Qwen2.5-3B", "default", {"captured": False}, (500, 100, 7)),
]


def test_a_request_has_whole_pages_and_the_pool_one_more():
    assert PAGE == 64
    assert [pages_of(count) for count in (1, 63, 64, 65, 128, 129)] == [1, 1, 1, 2, 2, 3]
    assert [pool_pages(*one) for one in ((1, 1), (1, 64), (1, 65), (8, 1000))] == [2, 2, 3, 8 * 16 + 1]
    assert pool_tokens(8, 1000) == (8 * 16 + 1) * 64


def test_the_kv_cache_of_a_plan_is_its_pages():
    """Qwen2.5-7B: 28 layers, 4 heads of 128 elements for keys and for values, 2 bytes each."""
    found = qv.estimate_vram(SEVEN, "default", prompt_len=1_500, max_new_tokens=500, concurrency=16)
    assert found.kv_cache == (16 * 32 + 1) * 64 * 28 * 2 * 4 * 128 * 2
    alone = qv.estimate_vram(SEVEN, "default", prompt_len=1_500, max_new_tokens=500, cache="preallocated")
    assert alone.kv_cache == 2_000 * 28 * 2 * 4 * 128 * 2
    _, architecture = resolve_model(SEVEN)
    for tokens in (1, 2_000):  # from the start
        size = kv_cache_bytes(architecture, found.profile, tokens=tokens, batch_size=16, context_len=2_000)
        assert size == found.kv_cache


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 63, 64, 65, 100, 128, 129, 500, 4096])
def test_each_batch_has_a_step_with_few_unused_rows(most):
    sizes = step_rows(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for rows in range(1, most + 1):
        size = next(one for one in sizes if one >= rows)
        assert size < 2 * rows or size == 1
        assert size - rows < 64
    assert len(sizes) <= 8 + most / 64


def test_rows_of_steps_double_and_then_grow_by_64():
    assert step_rows(1) == (1,)
    assert step_rows(6) == (1, 2, 4, 6)
    assert step_rows(200) == (1, 2, 4, 8, 16, 32, 64, 128, 192, 200)


def test_a_step_keeps_its_state_logits_and_choices():
    _, architecture = resolve_model("Qwen2.5-0.5B")
    profile, work = resolve_profile("default", **PAGED), Workload(prompt_len=700, max_new_tokens=68, batch_size=10)
    pages, vocabulary = 12, 151_936
    assert batch_step_sizes(architecture, profile, work) == (10 * (2 + pages) * 4, 10 * vocabulary * 4, 10 * 2 * 8)
    hosted = batch_step_sizes(architecture, profile.replace(embeddings="host", lm_head=None), work)
    assert hosted[3:] in ((), (10 * 896 * 2,))  # tied embeddings stay on the device with the head
    captured = batch_step_sizes(architecture, profile.replace(captured=True), work)
    assert captured[:3] == (10 * (2 + pages) * 4, 10 * vocabulary * 4, 10 * 2 * 8)
    assert len(captured) > 4
    assert sum(sampling_sizes(architecture)) == DRAWN_TOGETHER * vocabulary * (5 * 4 + 8 + 2)  # also of one request


@pytest.mark.parametrize(
    ("chunk", "work", "tokens"),
    [
        (None, (500, 12, 1), 500),
        (None, (500, 12, 4), 2_000),
        (None, (500, 12, 40), 4_096),
        (None, (5_000, 12, 4), 5_000),
        (512, (3_000, 12, 4), 512),
        (512, (100, 12, 2), 200),
        (512, (10, 12, 40), 160),
    ],
)
def test_tokens_of_a_prefill_have_a_limit(chunk, work, tokens):
    profile = resolve_profile("default", **PAGED, prefill_chunk_size=chunk)
    assert packed_tokens(profile, Workload(**dict(zip(("prompt_len", "max_new_tokens", "batch_size"), work)))) == tokens


@pytest.mark.parametrize("row", ROWS[:-1], ids=lambda row: row[0])  # the last one is of a CPU
def test_more_requests_and_longer_ones_need_more(row):
    model, name, knobs, (prompt, new, most) = row
    asked = {"profile": name, **PAGED, **knobs}

    def needed(concurrency=most, prompt_len=prompt, max_new_tokens=new):
        return qv.estimate_vram(
            model, concurrency=concurrency, prompt_len=prompt_len, max_new_tokens=max_new_tokens, **asked
        )

    sizes = [needed(count) for count in sorted({1, 2, 3, most, most + 1, 2 * most})]
    assert [one.kv_cache for one in sizes] == sorted(one.kv_cache for one in sizes)
    assert [one.needed_bytes for one in sizes] == sorted(one.needed_bytes for one in sizes)
    assert needed(prompt_len=prompt + PAGE).kv_cache > needed().kv_cache
    assert needed(prompt_len=prompt + PAGE).needed_bytes >= needed().needed_bytes
    assert needed(max_new_tokens=new + PAGE).needed_bytes >= needed().needed_bytes


@pytest.mark.parametrize("step", [60, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize(("number", "row"), list(enumerate(ROWS)))
def test_no_smaller_session_needs_more_than_the_plan(number, row, step):
    """Shorter prompts and answers, with the pages and the steps of the plan."""
    model, name, knobs, work = row
    label, architecture = resolve_model(model)
    profile = resolve_profile(name, **{**PAGED, **knobs})
    planned = Workload(**dict(zip(("prompt_len", "max_new_tokens", "batch_size"), work)))
    promised = estimate(label, architecture, profile, planned, machine=DEFAULT, session=True)
    for workload in list(smaller(planned, model + name, grows=False))[number % step :: step]:
        alone = estimate(label, architecture, profile, workload, machine=DEFAULT)
        assert alone.needs_at_most(promised.needed_bytes), workload


@pytest.mark.torch
def test_the_pool_and_the_steps_allocate_what_is_counted(demo):
    pytest.importorskip("torch")
    from tests.helpers.batches import load_batched

    for most, work in ((3, {"prompt_len": 100, "max_new_tokens": 29}), (1, {"prompt_len": 63, "max_new_tokens": 1})):
        with load_batched(demo, most=most, **work) as llm:
            batcher, found = llm._generations.batcher, llm.plan.estimate
            assert batcher.pool.nbytes == found.kv_cache
            assert all(
                len(one) == pool_tokens(most, sum(work.values())) for pair in batcher.pool.layers for one in pair
            )
            assert batcher.pool.free_pages == most * pages_of(sum(work.values()))
            step = batcher._step
            kept = [one.nbytes for one in (step._state, step.logits, step._chosen)]
            assert kept == list(batch_step_sizes(found.architecture, llm.plan.profile, llm.plan.workload))
