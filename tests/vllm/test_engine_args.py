"""The arguments of plans, parsed by the real `vllm serve`: none is unknown, dropped or changed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.planning.capacity.available_memory import DeviceMemory
from qwen_vram.planning.vllm.arguments import VllmArguments

pytestmark = pytest.mark.vllm
HELPER = Path(__file__).parents[1] / "helpers" / "vllm_arguments.py"
# Fields of the engine's configuration, as far as a machine without a GPU makes one.
BUILT = ("kv_cache_memory_bytes", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enforce_eager")


def parse(folder: Path, commands: list[list[str]]) -> list[dict[str, object]]:
    """The results of the helper, by vLLM's own Python; this package is not on its path."""
    result = subprocess.run(
        [folder / "bin" / "python", HELPER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=400,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(Path.home())},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def served_plans(demo: Path, export: Path) -> dict[str, VllmArguments]:
    """Plans whose arguments together have every option that `to_vllm` writes."""

    def gpu(vram: object = "8GiB", **options: object) -> qv.Plan:
        return qv.plan(demo, vram=vram, ram="16GiB", **options)

    two = {0: "8GiB", 1: "8GiB"}
    return {
        "bf16": gpu(batch_size=4).to_vllm(),
        "fp16": gpu(profile="default", weights="fp16").to_vllm(),
        "fp32": gpu(profile="default", weights="fp32").to_vllm(),
        "nf4": gpu(profile="int4-flash").to_vllm(),
        "compact": gpu(profile="compact").to_vllm(),
        "export": gpu(profile="compact").to_vllm(checkpoint=export),
        "int8 cache": gpu(kv_cache="int8").to_vllm(),
        "int4 cache": gpu(kv_cache="int4").to_vllm(),
        "int8 with scales": gpu(kv_cache="int8").to_vllm(kv_cache_dtype="int8_per_token_head"),
        "fp8 with scales": gpu(kv_cache="int8").to_vllm(kv_cache_dtype="fp8_per_token_head"),
        "two GPUs": gpu(two, batch_size=2).to_vllm(host="0.0.0.0", port=9001, served_model_name="two"),
        "stages": gpu(two).to_vllm(tensor_parallel=1),
        "first node": gpu(two).to_vllm(nodes=2, master_addr="10.0.0.1"),
        "second node": gpu(two).to_vllm(nodes=2, node_rank=1, master_addr="10.0.0.1"),
        "ray": gpu(two).to_vllm(executor="ray"),
        "cpu": qv.plan(demo, vram={}, ram="8GiB", batch_size=4, prefill_chunk_size=256).to_vllm(),
        "cpu, two workers": qv.plan(demo, vram={}, ram="8GiB").to_vllm(tensor_parallel=2),
    }


def test_every_argument_reaches_the_engine(demo, gptq_demo, vllm_environment, monkeypatch):
    # On a machine with GPUs, plans write one option more.
    gpus = [DeviceMemory("a card", 24 * 2**30, 24 * 2**30, 0, (8, 6))] * 2
    monkeypatch.setattr("qwen_vram.planning.vllm.arguments.visible_gpus", lambda: gpus)
    plans = served_plans(demo, gptq_demo)
    written = {name for one in plans.values() for name in one.arguments}
    results = parse(vllm_environment, [one.command()[1:] for one in plans.values()])
    for (label, served), result in zip(plans.items(), results, strict=True):
        assert "error" not in result, (label, result)
        assert result["engine"]["model"] == served.model
        for name, value in served.arguments.items():
            field = name.replace("-", "_")
            fields = result["engine"] if field in result["engine"] else result["server"]
            expected = [value] if name == "served-model-name" else value
            assert fields[field] == expected, (label, name)
        for field in BUILT:
            if "config" in result and field.replace("_", "-") in served.arguments:
                assert result["config"][field] == served.arguments[field.replace("_", "-")], (label, field)
    assert any("config" in result for result in results)
    # Every option that any plan writes was parsed above.
    assert written == {
        "dtype",
        "kv-cache-memory-bytes",
        "max-model-len",
        "max-num-seqs",
        "max-num-batched-tokens",
        "kv-cache-dtype",
        "quantization",
        "gpu-memory-utilization",
        "enforce-eager",
        "tensor-parallel-size",
        "pipeline-parallel-size",
        "nnodes",
        "node-rank",
        "master-addr",
        "distributed-executor-backend",
        "headless",
        "host",
        "port",
        "served-model-name",
    }


def test_an_unknown_argument_fails_here(demo, vllm_environment):
    words = qv.plan(demo, vram="8GiB").vllm_command()[1:]
    (result,) = parse(vllm_environment, [[*words, "--kv-cache-bytes", "5"]])
    assert result["status"] == 2
    assert "unrecognized arguments: --kv-cache-bytes 5" in str(result["error"])
