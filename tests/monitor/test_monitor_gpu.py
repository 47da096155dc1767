"""The monitor on a GPU: the driver's own figures, a loaded model, and the cost of samples."""

import os
import resource
import shutil
import subprocess
import sys
import time

import pytest

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.monitor.sample import take

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

MIB = 2**20
needs_nvidia_smi = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="nvidia-smi is not installed")


@pytest.fixture(scope="module")
def llm():
    with qv.load(CHECKPOINT, profile="default", prompt_len=64, max_new_tokens=8, progress=False) as loaded:
        yield loaded


def nvidia_smi(query):
    """Rows of one of its tables."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    return [line.split(", ") for line in lines]


def sampled(visible):
    """UUIDs that a monitor sees in a fresh process with this `CUDA_VISIBLE_DEVICES`."""
    code = "from qwen_vram.monitor.sample import take\nprint(*[gpu.uuid for gpu in take().gpus])"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return ended.stdout.split()


def test_a_loaded_model_is_shown_with_its_promise(llm):
    llm.probe()
    sample = take()
    (plan,) = [one for one in sample.plans if one.pid == os.getpid()]
    (gpu,) = [one for one in sample.gpus if one.uuid.partition("-")[2] in plan.uuids]
    assert plan.promised["weights"] == llm.plan.estimate.weights == plan.measured["weights"]
    assert plan.total == llm.plan.estimate.process_total
    assert plan.generations == 1
    assert plan.used is not None
    assert 0 < plan.used <= gpu.used <= gpu.total
    assert plan.measured["process_total"] == plan.used
    assert plan.used <= 1.01 * plan.total


@needs_nvidia_smi
def test_bytes_are_those_of_nvidia_smi(llm):
    shown = {uuid: rest for uuid, *rest in nvidia_smi("gpu=uuid,memory.total,memory.used,name")}
    processes = nvidia_smi("compute-apps=gpu_uuid,used_memory")
    for gpu in take().gpus:
        total, used, name = shown[gpu.uuid]
        assert gpu.name == name
        assert gpu.used + gpu.free <= gpu.total
        # nvidia-smi counts the driver's reserved memory apart, which this version of NVML may count as used.
        assert abs(gpu.total - int(total) * MIB) < MIB
        assert 0 <= gpu.used - int(used) * MIB < 1024 * MIB
        told = sorted(int(used) for uuid, used in processes if uuid == gpu.uuid and used.isdecimal())
        if told:  # in some containers it lists no process
            assert sorted(one.used // MIB for one in gpu.processes if one.used is not None) == told
        assert gpu.power is not None
        assert gpu.power > 0
        assert gpu.temperature is not None
        assert 0 < gpu.temperature < 120


def test_gpus_are_those_that_cuda_shows_by_index_and_by_uuid(llm):
    every = sampled(",".join(str(index) for index in range(64)))  # entries after the last GPU are ignored
    assert [gpu.uuid for gpu in take().gpus]
    for index, uuid in enumerate(every):
        assert sampled(str(index)) == [uuid]
        assert sampled(uuid) == [uuid]
    assert sampled(",".join(reversed(every))) == every[::-1]
    assert sampled("-1") == []


def test_samples_at_the_default_interval_take_less_than_a_hundredth_of_a_core(llm):
    take()
    count, before, began = 50, resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    for _ in range(count):
        take()
    after, ended = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    busy = (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / count
    print(f"a sample: {1000 * busy:.2f} ms of a core, {1000 * (ended - began) / count:.2f} ms")
    assert busy < 0.01 * qv.Monitor().every
