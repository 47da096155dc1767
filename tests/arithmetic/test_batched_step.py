"""Times of mixed steps: against the times of one sequence, against what was measured, and their limits."""

import json
from pathlib import Path

import pytest

from qwen_vram.arithmetic.timing.attention import chunk_attention_seconds, prefill_attention_seconds
from qwen_vram.arithmetic.timing.batched_step import Connection, StepTimes
from qwen_vram.spec.cards.find import find_gpu, machine_of
from qwen_vram.spec.catalog import find
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload
from tests.fleet.fleets import replica

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SEVEN = find("Qwen2.5-7B-Instruct")
FUSED = {"attention": "fused", "kernels": "fused", "cache": "preallocated"}


def rows(name):
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def test_chunks_sum_to_the_attention_of_a_prompt():
    profile, machine = Profile(**FUSED, prefill_chunk_size=512), machine_of(find_gpu("H200"))
    parts = [chunk_attention_seconds(SEVEN, profile, machine, tokens=512, past=512 * one) for one in range(3)]
    whole = prefill_attention_seconds(SEVEN, profile, Workload(prompt_len=3 * 512), machine)
    assert sum(parts) == pytest.approx(whole)


def test_decode_steps_are_as_measured_on_an_h200():
    """Steps of one sequence that torch compiled, as vLLM's are: benchmarks/results/decode.jsonl."""
    cells = [row for row in rows("decode") if row["device"] == "NVIDIA H200" and row["cell"]["by"] == "compiled"]
    measured = [
        row["ms_per_token"] for row in cells if row["cell"]["weights"] == "bf16" and "7B" in row["cell"]["model"]
    ]
    assert measured
    for one in measured:
        assert 1000 * replica("H200").times.seconds(1, 656) == pytest.approx(one, rel=0.1)


@pytest.mark.parametrize("chunk", [1024, 2048, 4096])
def test_prompts_are_as_measured_on_an_h200(chunk):
    """32,000 tokens in chunks: benchmarks/results/caps_chunks.jsonl, this library's own kernels."""
    wanted = {"weights": "bf16", "attention": "fused", "kernels": "fused", "prefill_chunk_size": chunk}
    measured = [
        row["prefill_s"]
        for row in rows("caps_chunks")
        if wanted.items() <= row["cell"]["knobs"].items() and row["cell"]["prompt_len"] == 32_000
    ]
    times, prompt = replica("H200").times, range(0, 32_000, chunk)
    predicted = sum(times.seconds(0, 0, [(min(chunk, 32_000 - past), past)]) for past in prompt)
    assert min(measured) * 0.95 < predicted < min(measured) * 1.25


def test_more_sequences_share_the_reading_of_the_weights():
    times = replica("L4").times
    one, many = times.seconds(1, 500), times.seconds(32, 32 * 500)
    assert one < many < 1.4 * one
    # With very many rows the products take the time of their operations.
    assert times.without_attention(8192, 1) == pytest.approx(2 * times.without_attention(4096, 1), rel=0.02)


def test_tokens_and_slowdown_are_linear():
    plain, slow = replica("L4").times, replica("L4", slowdown=1.5).times
    chunks = [(512, 0), (100, 2048)]
    assert slow.seconds(7, 9000, chunks, 1) == pytest.approx(1.5 * plain.seconds(7, 9000, chunks, 1))
    assert slow.token_seconds == pytest.approx(1.5 * plain.token_seconds)
    more = plain.seconds(7, 9100) - plain.seconds(7, 9000)
    assert more == pytest.approx(100 * plain.token_seconds)


def test_gpus_that_share_layers_add_up_their_results():
    assert Connection().sum_seconds(10**9) == 0
    assert Connection(4, 100e9, 1e-5).sum_seconds(10**9) == pytest.approx(1e-5 + 1.5e9 / 100e9)
    two, four = (replica("A100-80GB", size=size).times.seconds(16, 16_000) for size in (2, 4))
    alone = replica("A100-80GB").times.seconds(16, 16_000)
    assert alone / 2 < two < alone
    assert two / 2 < four < two
    # A slow link costs more than the division gains, if the steps have many rows.
    pcie, prompt = [replica("RTX 4090", size=size).times for size in (1, 4)], [(2048, 0)]
    assert pcie[1].seconds(0, 0, prompt) > pcie[0].seconds(0, 0, prompt) / 2


def test_python_launches_limit_steps_that_are_not_captured():
    machine = machine_of(find_gpu("H200"))
    by_python, captured = Profile(**{**FUSED, "kernels": "plain"}), Profile(**FUSED, compiled=True)
    slow, fast = (StepTimes(SEVEN, profile, machine).seconds(1, 500) for profile in (by_python, captured))
    assert slow > 28 * machine.layer_launch_time / 1e9 > 3 * fast
