"""The commands of fleets, parsed by the real `vllm serve`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet.fleets import fleet
from tests.vllm.test_engine_args import parse

pytestmark = pytest.mark.vllm
LENGTHS = {"prompt_len": (10, 300), "max_new_tokens": 100}


def test_vllm_parses_the_commands_of_a_fleet(vllm_environment: Path, demo: Path) -> None:
    plans = [
        fleet("L4", model=demo, **LENGTHS, weights="bf16"),
        fleet("L4", model=demo, **LENGTHS, weights="bf16", tensor_parallel=2),
        fleet("T4", model=demo, **LENGTHS),
        fleet("L4", model=demo, **LENGTHS, weights="fp8"),
    ]
    servers = [plan.vllm_commands()[0] for plan in plans]
    found = parse(vllm_environment, [list(server.arguments[1:]) for server in servers])
    for plan, one in zip(plans, found, strict=True):
        assert "error" not in one, one
        engine = one["engine"]
        assert engine["kv_cache_memory_bytes"] == plan.best.memory.kv_cache
        assert engine["max_model_len"] == 400
        assert engine["max_num_seqs"] == plan.best.limits.sequences
        assert engine["max_num_batched_tokens"] == plan.best.limits.step_tokens
        assert engine["tensor_parallel_size"] == plan.best.tensor_parallel
        assert one["server"]["host"] == "127.0.0.1"
    assert [one["engine"]["dtype"] for one in found] == ["bfloat16", "bfloat16", "float16", "bfloat16"]
    assert found[-1]["engine"]["quantization"] == "fp8_per_channel"
