"""Requests together on a GPU: their answers, and the promised memory."""

from __future__ import annotations

import random

import pytest
import torch

import qwen_vram as qv
from qwen_vram.runtime.attention.fused import fused_attention, packed_attention
from qwen_vram.runtime.measure import process_bytes

pytestmark = pytest.mark.gpu
ASKED = ["What is 12 + 30?", "What is 7 * 8?", "3 + 4 = ?", "What is 61 - 14?", "小华有三本词典。小华的东西是什么？"]
KNOBS = [
    {"weights": "bf16"},
    {"weights": "nf4"},
    {"weights": "nf4", "lm_head": "nf4", "embeddings": "host"},
    {"weights": "int8-wo"},
    {"weights": "int4"},
    {"weights": "fp8", "prefill_chunk_size": 16},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: " ".join(map(str, knobs.values())))
def test_answers_are_those_of_one_request_alone(demo, knobs):
    work = {"prompt_len": 400, "max_new_tokens": 40, "progress": False}
    with qv.load(demo, concurrency=1, **work, **knobs) as alone:
        expected = [alone.chat(question, temperature=0) for question in ASKED]
    with qv.load(demo, concurrency=8, **work, **knobs) as llm:
        pending = [llm.submit(question, temperature=0) for question in ASKED * 4]
        found = [one.result() for one in pending]
        assert found == expected * 4
        assert "".join(llm.stream(ASKED[0], temperature=0)) == expected[0]
        report = llm.report()
    assert report.measured["peak_allocated"] <= 1.01 * report.estimate.peak_allocated


def test_a_session_of_mixed_requests_stays_within_its_promise(published):
    """Random prompts on the published shape of Qwen2.5-0.5B, up to the planned maximum, three times over."""
    rng = random.Random(3)
    with qv.load(published, concurrency=12, prompt_len=1_500, max_new_tokens=120, progress=False) as llm:
        llm.model.generation_config.eos_token_id = None
        made, width = llm._generations, llm.model.config.vocab_size

        def job(prompt, new):
            ids = torch.tensor([[rng.randrange(width) for _ in range(prompt)]])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return made.job(
                lambda: llm.model, inputs, new, {"do_sample": rng.random() < 0.5, "top_k": 20, "top_p": 0.9}
            )

        for _ in range(3):
            jobs = [job(rng.randint(1, 1_500), rng.randint(1, 120)) for _ in range(24)]
            jobs += [job(1_500, 120) for _ in range(13)]
            for one in jobs:
                one.start()
            for one in jobs:
                one.result()
            assert made.batcher.pool.free_pages == 12 * -(-1_620 // 64)
            measured = llm.report().measured
            promised = llm.plan.estimate
            assert measured["kv_cache"] == promised.kv_cache
            assert abs(measured["peak_allocated"] / promised.peak_allocated - 1) < 0.01
            assert measured["peak_reserved"] <= promised.process_total - promised.beside_torch
            assert process_bytes(llm.device) <= 1.01 * promised.process_total


def test_a_tight_budget_holds(published):
    work = {"concurrency": 8, "prompt_len": 2_000, "max_new_tokens": 64}
    needed = qv.plan(published, profile="default", vram="80GiB", **work).estimate.needed_bytes
    total = torch.cuda.get_device_properties(0).total_memory
    with qv.load(published, profile="default", vram=needed, progress=False, **work) as llm:
        beside = llm.plan.estimate.beside_torch
        torch.cuda.set_per_process_memory_fraction(min(1.0, (needed - beside) / total))
        try:
            for _ in range(2):
                llm.probe()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


@torch.inference_mode()
def test_packed_sequences_have_their_own_attention():
    torch.manual_seed(0)
    lengths = [1, 70, 33, 200]
    query = torch.randn(1, 14, sum(lengths), 64, dtype=torch.bfloat16, device="cuda")
    key, value = (torch.randn(1, 2, sum(lengths), 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = packed_attention(query, key, value, bounds.cuda(), 200, None)
    by_name = fused_attention(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds.cuda(), cu_seq_lens_k=bounds.cuda(),
        max_length_q=200, max_length_k=200,
    )[0]  # fmt: skip
    assert torch.equal(packed, by_name)
    expected = packed_attention(*(one.float().cpu() for one in (query, key, value)), bounds, 200, None)
    assert (packed.float().cpu() - expected).abs().max() <= 0.02
