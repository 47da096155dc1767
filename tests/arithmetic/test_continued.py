"""New tokens after a filled cache are fed in pieces whose live bytes the plan covers."""

from dataclasses import replace

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.continued import largest_piece
from qwen_vram.arithmetic.replay.live_bytes import chunk_bytes, moments

SEVEN = "Qwen2.5-7B"
KNOBS = {
    "sdpa": {"profile": "default"},
    "eager": {"profile": "default", "attention": "eager"},
    "fused": {"profile": "default", "attention": "fused", "cache": "preallocated"},
    "chunks": {"profile": "default", "attention": "sdpa", "cache": "preallocated", "prefill_chunk_size": 1_000},
}


def piece(known, prompt_len, held):
    workload = replace(known.workload, prompt_len=prompt_len)
    return largest_piece(known, known.profile, workload, held=held, covered=known.workload)


def live(known, queries, past):
    return sum(chunk_bytes(known.architecture, known.profile, known.workload, queries=queries, past=past))


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_a_short_message_is_fed_at_once(knobs):
    known = qv.estimate_vram(SEVEN, prompt_len=4_096, max_new_tokens=512, **knobs)
    for held in (100, 2_000, 4_000):
        assert piece(known, held + 90, held) == 90


def test_tokens_that_would_need_a_mask_beyond_the_plan_are_fed_in_halves():
    known = qv.estimate_vram(SEVEN, prompt_len=4_096, max_new_tokens=512, **KNOBS["sdpa"])
    most = max(moment.total for moment in moments(known.architecture, known.profile, known.workload))
    assert live(known, 4_095, 1) > most  # a mask, and keys and values for every query head
    found = piece(known, 4_096, 1)
    assert found == 4_095 // 2
    assert live(known, found, 4_096 - found) <= most


def test_fused_attention_feeds_all_new_tokens_at_once():
    known = qv.estimate_vram(SEVEN, prompt_len=4_096, max_new_tokens=512, **KNOBS["fused"])
    assert piece(known, 4_096, 1) == 4_095


def test_a_piece_is_at_most_a_chunk():
    known = qv.estimate_vram(SEVEN, prompt_len=4_096, max_new_tokens=512, **KNOBS["chunks"])
    assert piece(known, 4_096, 1_500) == 1_000
    assert piece(known, 1_700, 1_500) == 200


def test_no_piece_is_covered_by_a_plan_for_one_token():
    known = qv.estimate_vram(SEVEN, prompt_len=1, max_new_tokens=1, **KNOBS["sdpa"])
    assert piece(known, 4_096, 4_000) == 0


def test_every_gpu_has_to_cover_the_piece():
    plan = qv.plan(SEVEN, prompt_len=4_096, max_new_tokens=512, vram={0: "20GiB", 1: "20GiB"}, **KNOBS["sdpa"])
    known = plan.estimate
    assert set(known.devices) == {0, 1}
    found = piece(known, 4_096, 1)
    for part in known.devices.values():
        most = max(moment.total for moment in moments(part.architecture, part.profile, known.workload))
        assert live(part, found, 4_096 - found) <= most
