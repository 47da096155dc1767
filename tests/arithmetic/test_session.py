"""A plan covers a session: no smaller workload needs a byte more than what was planned."""

import random
from dataclasses import asdict, replace
from itertools import islice

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.session import outlier_bytes
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.planning.capacity.budget import Budget
from qwen_vram.spec.machine import DEFAULT
from qwen_vram.spec.profile import resolve_profile
from qwen_vram.spec.workload import Workload

MIB = 2**20
# Model, profile, knobs, and the planned (prompt_len, max_new_tokens, batch_size, padded).
ROWS = [
    ("Qwen2.5-0.5B", "default", {}, (4_000, 16, 1, False)),
    ("Qwen2.5-7B", "default", {"weights": "int8"}, (2_048, 16, 1, False)),
    ("Qwen2.5-1.5B", "default", {"weights": "int8-wo", "prefill_chunk_size": 512}, (5_000, 16, 4, False)),
    ("Qwen3-0.6B", "default", {"weights": "fp4", "kernels": "fused"}, (2_175, 16, 1, False)),
    ("Qwen2.5-7B", "int4-flash", {}, (8_000, 256, 1, False)),
    ("Qwen2.5-14B", "int4-flash", {"weights": "nf4-plain"}, (3_000, 64, 1, False)),
    ("Qwen3-8B", "int4-flash", {"kv_cache": "int4"}, (2_851, 16, 4, False)),
    ("Qwen2.5-7B", "cpu-offload", {}, (4_000, 512, 1, False)),
    ("Qwen2.5-14B", "cpu-offload", {"weights": "int8", "prefill_chunk_size": 256}, (5_001, 64, 4, False)),
    ("Qwen3-4B", "cpu-offload", {"weights": "fp16"}, (1_500, 64, 2, True)),
    ("Qwen2.5-14B", "split-kv", {}, (6_000, 256, 1, False)),
    (
        "Qwen2.5-14B",
        "split-kv",
        {"weights": "nf4", "kv_cache": "int4", "prefill_chunk_size": 1024},
        (5_998, 256, 1, False),
    ),
    ("Qwen2.5-14B", "split-kv", {"weights": "nf4", "lm_head": "nf4"}, (540, 512, 1, False)),
    ("Qwen2.5-3B", "split-kv", {}, (600, 16, 1, False)),
    ("Qwen2.5-7B", "compact", {}, (16_000, 256, 1, False)),
    ("Qwen2.5-0.5B", "compact", {}, (8_000, 64, 8, False)),
    ("Qwen3-8B", "compact", {}, (700, 16, 70, True)),
    ("Qwen2.5-1.5B", "compact", {"weights": "fp4"}, (10_000, 64, 2, False)),
    ("Qwen2.5-7B", "compact", {"kv_cache": "int8"}, (16_000, 256, 1, False)),
    ("Qwen2.5-14B", "compact", {"kv_device": "host"}, (8_000, 512, 1, False)),
    ("Qwen2.5-7B", "speed", {}, (2_048, 256, 1, False)),
    ("Qwen2.5-0.5B", "speed", {"weights": "bf16", "lm_head": None}, (4_000, 256, 2, False)),
    ("Qwen3-4B", "speed", {"weights": "nf4", "lm_head": "nf4"}, (3_000, 64, 1, False)),
    ("Qwen2.5-7B", "tiny", {}, (32_000, 256, 1, False)),
    ("Qwen3-4B", "tiny", {"prefill_chunk_size": 2048}, (3_111, 512, 4, False)),
    ("Qwen2.5-14B", "tiny", {"kv_cache": "int4"}, (8_442, 16, 1, False)),
    ("Qwen2.5-7B", "compact", {"weights": "int4", "lm_head": None}, (4_000, 64, 1, False)),
    ("Qwen2.5-7B", "compact", {"weights": "fp8", "lm_head": "fp8"}, (4_000, 64, 1, False)),
    ("Qwen2.5-3B", "compact", {"weights": "gptq-int4", "lm_head": None}, (3_000, 64, 1, False)),
    ("Qwen3-8B", "compact", {"weights": "gptq-int8", "lm_head": None}, (3_000, 64, 2, True)),
    ("Qwen2.5-1.5B", "default", {"weights": "fp32"}, (1_500, 16, 1, False)),
    ("Qwen2.5-7B", "int4-flash", {"dequantization": "whole"}, (2_000, 64, 1, False)),
    ("Qwen2.5-7B", "int4-flash", {"dequantization": "whole", "captured": True}, (2_048, 256, 1, False)),
    ("Qwen2.5-7B", "compact", {"captured": True}, (8_000, 64, 1, False)),
    ("Qwen3-4B", "int4-flash", {"weights": "int8-wo", "captured": True}, (1_500, 64, 4, True)),
]
FORMATS = {
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "nf4",
    "nf4-plain",
    "fp4",
    "gptq-int4",
    "gptq-int8",
    "int4",
    "int8-wo",
    "fp8",
}


def smaller(planned, seed, *, grows):
    """Every prompt of 1 to 600 tokens and 400 longer ones, with batches and answers up to the planned ones.

    A cache that `grows` is followed through all steps of an answer, which takes long: few answers are long there.
    """
    rng = random.Random(seed)
    context, batch = planned.context_len, planned.batch_size
    longer = [rng.randint(1, planned.prompt_len) for _ in range(400)]
    for length in [*range(1, min(600, planned.prompt_len) + 1), *longer]:
        most = planned.max_new_tokens if grows and rng.random() < 0.95 else context - length
        new = rng.choice((1, planned.max_new_tokens, rng.randint(1, most), most))
        padded = planned.padded and rng.random() < 0.7
        yield replace(
            planned,
            prompt_len=length,
            max_new_tokens=min(new, context - length),
            batch_size=rng.choice((1, batch, batch, rng.randint(1, batch))),
            padded=padded,
        )


@pytest.mark.parametrize("step", [40, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize(("number", "row"), list(enumerate(ROWS)))
def test_no_smaller_workload_needs_more_than_the_session(number, row, step):
    """Of each `step` workloads one; rows begin at different ones."""
    model, name, knobs, work = row
    label, architecture = resolve_model(model)
    profile = resolve_profile(name, **knobs)
    planned = Workload(**dict(zip(("prompt_len", "max_new_tokens", "batch_size", "padded"), work)))
    promised = estimate(label, architecture, profile, planned, machine=DEFAULT, session=True)
    workloads = smaller(planned, model + name, grows=profile.cache == "dynamic")
    for workload in islice(workloads, number % step, None, step):
        alone = estimate(label, architecture, profile, workload, machine=DEFAULT)
        assert alone.needs_at_most(promised.needed_bytes), workload


def test_int8_counts_what_its_data_can_take():
    """Beside the margins that every format has."""
    label, architecture = resolve_model("Qwen2.5-7B")
    planned = Workload(prompt_len=8_192, max_new_tokens=16)
    # Pieces of q_proj's input, 4,681 rows of 3,584 elements in fp16, and the buffer of the search.
    tiled = resolve_profile("default", weights="int8")
    assert outlier_bytes(architecture, tiled, planned) == 4_681 * 3_584 * 2 + 2 * MIB
    whole = tiled.replace(dequantization="whole")
    columns = 6 * 3_584 + 18_944  # of q, k, v, o, gate and up, and of down
    assert outlier_bytes(architecture, whole, planned) == 28 * columns * 8
    assert outlier_bytes(architecture, resolve_profile("compact"), planned) == 0
    for profile in (tiled, whole):
        alone = estimate(label, architecture, profile, planned, machine=DEFAULT)
        promised = estimate(label, architecture, profile, planned, machine=DEFAULT, session=True)
        assert promised.needed_bytes > alone.needed_bytes + outlier_bytes(architecture, profile, planned)


def test_a_plan_counts_a_session_and_an_estimate_one_prompt():
    work = {"prompt_len": 2_048, "max_new_tokens": 256}
    plan = qv.plan("Qwen2.5-7B", vram="8GiB", ram="64GiB", **work)
    alone = qv.estimate_vram("Qwen2.5-7B", plan.profile, **work)
    assert plan.estimate.is_of_session
    assert not alone.is_of_session
    assert plan.to_dict()["estimate"]["session"] is True
    assert plan.estimate.peak_allocated == alone.peak_allocated
    assert alone.needed_bytes < plan.estimate.needed_bytes <= 1.02 * alone.needed_bytes
    assert plan.steps[-1].needed_bytes == plan.estimate.needed_bytes
    assert qv.Plan.from_dict(plan.to_dict()).estimate.needed_bytes == plan.estimate.needed_bytes


def test_what_the_process_holds_already_is_counted_once():
    """Kernels and streams of closed models stay in a process; a new model shares its CUDA context."""
    label, architecture = resolve_model("Qwen2.5-7B")
    profile, work = resolve_profile("compact"), Workload()
    fresh, held = (estimate(label, architecture, profile, work, machine=DEFAULT, held=size) for size in (0, 900 * MIB))
    assert held.process_total - fresh.process_total == 900 * MIB - fresh.beside_torch > 0
    assert (
        estimate(label, architecture, profile, work, machine=DEFAULT, held=100 * MIB).process_total
        == fresh.process_total
    )
    assert Budget.from_dict(asdict(Budget(vram=2**33, ram=0, held={0: 5}))).held == {0: 5}
