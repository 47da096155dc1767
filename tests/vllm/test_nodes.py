"""Two nodes of vLLM on one machine: each runs the command of its rank, and they share every layer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.serving.vllm.server import free_port

pytestmark = pytest.mark.vllm
# Both nodes would take the same cores. One of 2 cores is also kept for the server otherwise.
VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def test_two_nodes_answer_as_one(demo: Path, vllm_environment: Path, vllm_on_cpu: bool, tmp_path: Path):
    if not vllm_on_cpu:
        pytest.skip("two nodes on one machine need a GPU each")
    plan = qv.plan(demo, vram={}, ram="4GiB")
    port = free_port()
    options = {"nodes": 2, "master_addr": "127.0.0.1", "tensor_parallel": 2, "port": port}
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | VARIABLES
    nodes, logs = [], []
    try:
        for rank in (0, 1):
            command = plan.vllm_command(node_rank=rank, **options)
            command[0] = str(vllm_environment / "bin" / "vllm")
            logs.append(tmp_path / f"{rank}.log")
            with logs[-1].open("w") as log:
                node = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True
                )
            nodes.append(node)
        end = time.monotonic() + 700
        while not healthy(port):
            said = "\n".join(log.read_text()[-3000:] for log in logs)
            assert all(node.poll() is None for node in nodes), said
            assert time.monotonic() < end, said
            time.sleep(1)
        body = {"model": "checkpoint", "messages": [{"role": "user", "content": "What is 96 * 9?"}], "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=200) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        assert text == "96 * 9 = 90 * 9 + 6 * 9 = 810 + 54 = 864"
        assert "Worker_TP0" in logs[0].read_text()
        assert "Worker_TP1" in logs[1].read_text()
        tokens = plan.to_vllm(**options).memory.tokens
        assert f"KV cache size: {tokens:,} tokens" in logs[0].read_text()
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
