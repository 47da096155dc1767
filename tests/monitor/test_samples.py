"""Samples: GPUs by a driver's stand-in, the host, and the plans of models that are loaded."""

import json
import os
import subprocess
import sys
import types

import psutil
import pytest

import qwen_vram as qv
from qwen_vram.checkpoints import running_plans
from qwen_vram.checkpoints.running_plans import Publication, read_all
from qwen_vram.monitor.sample import Sample, take
from qwen_vram.monitor.tables import COLUMNS, csv_rows

GIB = 2**30
HERE = -1  # this process's number


class Owner:
    """Something that owns a publication, as a loaded model does."""


def facts(**other):
    promised = {"weights": 6 * GIB, "process_total": 8 * GIB}
    return {
        "model": "Qwen2.5-7B", "call": "qv.load(...)", "uuids": ["8932f937"], "promised": promised,
        "measured": {"weights": 6 * GIB}, "generations": 0, **other,
    }  # fmt: skip


@pytest.fixture
def driver(monkeypatch):
    """NVML of a machine with two GPUs: this process and another one on the first, whose numbers may be changed."""
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.uuids = ["GPU-8932f937", "GPU-11111111"]
    nvml.pids = {0: [(os.getpid(), 7 * GIB), (1, 2 * GIB)], 1: []}
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetUUID = lambda handle: nvml.uuids[handle]
    nvml.nvmlDeviceGetName = lambda handle: b"RTX 4090"
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=24 * GIB, free=15 * GIB, used=9 * GIB)
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=37, memory=5)
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 212_500
    nvml.nvmlDeviceGetTemperature = lambda handle, kind: 61
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: [
        types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in nvml.pids[handle]
    ]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return nvml


def test_a_sample_has_every_gpu_with_its_processes_and_plans(driver):
    owner = Owner()
    publication = Publication(owner, facts())
    sample = take()
    first, second = sample.gpus
    assert (first.uuid, first.name, first.total, first.used, first.free) == (
        "GPU-8932f937", "RTX 4090", 24 * GIB, 9 * GIB, 15 * GIB,
    )  # fmt: skip
    assert (first.utilization, first.power, first.temperature) == (37, 212.5, 61)
    assert [(one.pid, one.used) for one in first.processes] == [(os.getpid(), 7 * GIB), (1, 2 * GIB)]
    assert first.processes[0].name == psutil.Process().name()
    assert second.processes == ()
    (plan,) = sample.plans
    assert (plan.model, plan.used, plan.promised["process_total"]) == ("Qwen2.5-7B", 7 * GIB, 8 * GIB)
    assert sample.host.total == psutil.virtual_memory().total
    assert 0 < sample.host.available <= sample.host.total
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
    publication.remove()
    assert take().plans == ()


@pytest.mark.parametrize(
    ("pids", "used"),
    [
        ([(HERE, None)], None),  # WSL knows the processes and not their bytes
        ([(HERE, 2**64 - 1)], None),  # NVML's mark for "not available"
        ([(2**22 + 5, 3 * GIB)], 3 * GIB),  # a container: one process of a number that is not known here
        ([(2**22 + 5, 3 * GIB), (2**22 + 6, GIB)], None),
        ([(1, 3 * GIB)], None),  # another process of this machine
        ([], None),
    ],
    ids=str,
)
def test_what_a_driver_does_not_tell_is_unknown_and_not_zero(driver, pids, used):
    driver.pids[0] = [(os.getpid() if pid == HERE else pid, nbytes) for pid, nbytes in pids]
    owner = Owner()
    publication = Publication(owner, facts())
    (plan,) = take().plans
    assert plan.used == used
    publication.remove()


def test_the_gpus_are_those_that_cuda_shows(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1111")
    assert [gpu.uuid for gpu in take().gpus] == ["GPU-11111111"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [gpu.uuid for gpu in take().gpus] == ["GPU-11111111", "GPU-8932f937"]


def test_a_driver_that_tells_the_memory_alone(driver):
    def refuse(*about):
        raise driver.NVMLError("Not Supported")

    for name in ("UtilizationRates", "PowerUsage", "Temperature", "ComputeRunningProcesses"):
        setattr(driver, f"nvmlDeviceGet{name}", refuse)
    gpu = take().gpus[0]
    assert (gpu.used, gpu.utilization, gpu.power, gpu.temperature, gpu.processes) == (9 * GIB, None, None, None, ())


def test_csv_has_a_line_for_each_process(driver):
    owner = Owner()
    publication = Publication(owner, facts(measured={"process_total": 5}))
    lines = csv_rows(take(), header=True).splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    assert len(lines) == 1 + 2 + 1 + 1  # two processes, a GPU without one, the host
    assert lines[1].endswith(f",{7 * GIB},Qwen2.5-7B,{8 * GIB},5")
    assert csv_rows(take(), header=False).count("\n") == 4
    publication.remove()


def test_a_file_of_a_killed_process_is_removed_and_a_broken_one_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(tmp_path))
    code = (
        "import os, signal\nfrom qwen_vram.checkpoints.running_plans import Publication\n"
        "class Owner: pass\nowner = Owner()\np = Publication(owner, {'model': 'm'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(list(running_plans.folder().glob("*.json"))) == 1
    (running_plans.folder() / "0-broken.json").write_text("{")
    assert read_all() == []
    assert [path.name for path in running_plans.folder().glob("*.json")] == ["0-broken.json"]


def test_a_dropped_owner_and_the_end_of_a_process_remove_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(tmp_path))
    owner = Owner()
    Publication(owner, facts())
    assert len(read_all()) == 1
    del owner
    assert read_all() == []
    code = (
        "from qwen_vram.checkpoints.running_plans import Publication, read_all\n"
        "class Owner: pass\nowner = Owner()\np = Publication(owner, {'model': 'm'})\nprint(len(read_all()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "1\n"
    assert list(running_plans.folder().glob("*")) == []


def test_a_fork_leaves_the_file_to_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(tmp_path))
    owner = Owner()
    publication = Publication(owner, facts())
    child = os.fork()
    if child == 0:
        publication.update(generations=9)
        publication.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert [one["generations"] for one in read_all()] == [0]
    publication.remove()


def test_a_folder_that_cannot_be_written_changes_nothing_else(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(tmp_path / "file"))
    caplog.set_level("INFO")
    owner = Owner()
    publication = Publication(owner, facts())
    publication.update(generations=1)
    publication.remove()
    assert caplog.text.count("a monitor cannot see this model's plan") == 1
    assert read_all() == []


@pytest.mark.torch
def test_a_loaded_model_is_seen_with_what_it_measured(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(tmp_path))
    with qv.load(demo, device="cpu", progress=False, max_new_tokens=8) as llm:
        (plan,) = take().plans
        assert (plan.pid, plan.generations, plan.call) == (os.getpid(), 0, llm.plan.call)
        parts = ("weights", "kv_cache", "activations")
        assert plan.promised == {part: getattr(llm.plan.estimate, part) for part in parts}
        assert plan.total is None
        assert plan.used == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
        llm.chat("hello", max_new_tokens=4)
        (plan,) = take().plans
        assert (plan.generations, plan.measured) == (1, llm.report().measured)
    assert take().plans == ()
