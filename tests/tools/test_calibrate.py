"""What a machine takes: measured once, kept in a file, used by every estimate; and stated defaults without it."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.timing.bytes_moved import decode_floor_ms
from qwen_vram.checkpoints import cpu_info, machine_file
from qwen_vram.checkpoints.cpu_info import has_4bit_kernel
from qwen_vram.checkpoints.machine_file import CalibrationError, cache_file, current, read, reset, store
from qwen_vram.planning.capacity import hardware
from qwen_vram.spec.machine import DEFAULT, FIGURES, Machine, parse_machine
from qwen_vram.tools import calibrate, calibrate_steps, disk_rate, product_rates
from tests.helpers.command import qwen_vram

SEVEN = "Qwen2.5-7B-Instruct"
MEASURED = Machine(
    device="NVIDIA GeForce RTX 4090",
    cuda_context=400_000_000,
    lazy_kernels=100_000_000,
    device_bandwidth=900_000_000_000,
    pinned_copy_rate=25_000_000_000,
    host_bandwidth=40_000_000_000,
    disk_read_rate=2_000_000_000,
    host_product_rate=30_000_000_000,
    host_4bit_rate=35_000_000_000,
    host_matmul_rate=900_000_000_000,
    host="AMD Ryzen 9 7950X, 16 cores",
    torch="2.11.0+cu130",
    driver="580.95.05",
    date="2026-11-24",
    source="measured",
)
FOUND = {
    "gpu": {"no_gpu": None},
    "context": {"context": 400, "device": "a GPU", "torch": "2.11.0", "driver": "580"},
    "kernels-bf16": {"kernels-bf16": 450},
    "kernels-nf4": {"kernels-nf4": 470},
    "rates": {"device_bandwidth": 9, "pinned_copy_rate": 5},
    "copies": {"host_bandwidth": 7},
    "launches": {"layer_launch_time": 600, "graph_node_time": 2, "matmul_rate": 11},
    "products": {
        "host": "a CPU", "torch": "2.11.0", "host_product_rate": 8, "host_4bit_rate": None, "host_matmul_rate": 12,
    },
    "disk": {"disk_read_rate": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "has_4bit_kernel", lambda: True)
    current.cache_clear()
    yield tmp_path
    current.cache_clear()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_vram", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})


# The file


def test_what_is_stored_is_read_back():
    assert read() is None
    assert store(MEASURED) == cache_file()
    assert current() == MEASURED
    assert read().machines == {"NVIDIA GeForce RTX 4090, torch 2.11.0+cu130": MEASURED}


def test_the_machine_measured_last_is_the_current_one_and_others_stay(folder):
    newer = MEASURED._replace(torch="2.12.0+cu130", cuda_context=410_000_000)
    for machine in (MEASURED, newer, MEASURED._replace(date="2026-12-24")):
        store(machine)
    assert current().date == "2026-12-24"
    assert set(read().machines) == {MEASURED.key, newer.key}
    assert [path.name for path in folder.iterdir()] == ["machines.json"]


@pytest.mark.parametrize(
    ("environment", "file"),
    [
        ({"QWEN_VRAM_CACHE": "/here"}, "/here/machines.json"),
        ({"QWEN_VRAM_CACHE": "~/here"}, "/home/me/here/machines.json"),
        ({"QWEN_VRAM_CACHE": "", "XDG_CACHE_HOME": "/there"}, "/there/qwen_vram/machines.json"),
        ({"QWEN_VRAM_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/qwen_vram/machines.json"),
    ],
)
def test_where_it_is_stored(monkeypatch, environment, file):
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_file() == Path(file)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_a_write_that_is_interrupted_changes_nothing(monkeypatch, folder, interruption):
    before = store(MEASURED).read_bytes()

    def interrupted(number):
        raise interruption("now")

    monkeypatch.setattr(machine_file.os, "fsync", interrupted)
    with pytest.raises(CalibrationError if interruption is OSError else KeyboardInterrupt):
        store(MEASURED._replace(cuda_context=1))
    assert cache_file().read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["machines.json"]


def stored_as(**changes):
    return json.dumps({"format": 1, "current": "a", "machines": {"a": {**MEASURED._asdict(), **changes}}})


BROKEN = {
    "empty": "",
    "cut off": stored_as()[:200],
    "not text": "\udcff\udcfe",
    "a list": "[]",
    "another program's": '{"version": 3}',
    "another format": stored_as().replace('"format": 1', '"format": 2'),
    "no such machine": stored_as().replace('"current": "a"', '"current": "b"'),
    "no name": stored_as().replace('"current": "a"', '"current": []'),
    "nested": "[" * 100_000,
    "a context of text": stored_as(cuda_context="400"),
    "a context of nothing": stored_as(cuda_context=0),
    "a rate of nothing": stored_as(device_bandwidth=0),
    "a rate that no float holds": stored_as(device_bandwidth=10**400),
    "a flag": stored_as(cuda_context=True),
    "no rate": stored_as(host_bandwidth=None),
    "a field too many": stored_as(colour="red"),
    "no launches": stored_as(layer_launch_time=None),
    "a number for a host": stored_as(host=64),
    "a number for a name": stored_as(device=4090),
    "a default": stored_as(source="default"),
    "kept that is none": stored_as(kept=["device"]),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_a_file_that_cannot_be_used_is_one_warning_and_the_defaults(text):
    cache_file().write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match="cannot use the stored machines in .*--reset.*the defaults are used") as seen:
        assert qv.estimate_vram(SEVEN).process_total == qv.estimate_vram(SEVEN).process_total
    assert len(seen) == 1
    assert current() == DEFAULT
    with pytest.raises(CalibrationError, match="cannot use the stored machines"):
        read()


def test_a_file_that_cannot_be_used_is_replaced_and_can_be_deleted():
    cache_file().write_text("{")
    store(MEASURED)
    assert current() == MEASURED
    cache_file().write_text("{")
    assert reset()


def test_a_folder_in_the_files_place_warns_too():
    cache_file().mkdir()
    with pytest.warns(UserWarning, match="IsADirectoryError|PermissionError"):
        assert current() == DEFAULT
    with pytest.raises(CalibrationError, match="delete it by hand"):
        reset()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("QWEN_VRAM_CACHE", str(folder / "file" / "cache"))
    monkeypatch.setattr(calibrate, "run_step", lambda step: pytest.fail("measured"))
    with pytest.raises(CalibrationError, match="set QWEN_VRAM_CACHE to a folder that can be written"):
        calibrate.calibrate(say=lambda line: None)


def test_reset_forgets():
    store(MEASURED)
    assert current() == MEASURED
    assert reset()
    assert current() == DEFAULT
    assert not reset()


def test_a_default_is_nothing_to_store():
    with pytest.raises(ValueError, match="source"):
        parse_machine({**MEASURED._asdict(), "source": "default", "kept": []})


# The estimator


def test_the_process_changes_by_what_was_measured():
    before = qv.estimate_vram(SEVEN)
    store(MEASURED)
    after = qv.estimate_vram(SEVEN)
    measured, stated = (machine.cuda_context + machine.lazy_kernels for machine in (MEASURED, DEFAULT))
    assert after.process_total - before.process_total == measured - stated
    assert after.needed_bytes - before.needed_bytes == measured - stated
    assert after.peak_reserved == before.peak_reserved
    # An estimate keeps the machine that it was made for.
    assert before.machine == DEFAULT


def test_an_estimate_says_whose_context_it_counts():
    assert qv.estimate_vram(SEVEN).to_dict()["machine"]["source"] == "default"
    assert "measured" not in str(qv.estimate_vram(SEVEN))
    store(MEASURED)
    estimate = qv.estimate_vram(SEVEN)
    assert estimate.to_dict()["machine"]["source"] == "measured"
    note = "CUDA context measured on NVIDIA GeForce RTX 4090, 2026-11-24"
    assert note in str(estimate).splitlines()[0]
    assert note in estimate._repr_html_()
    assert note not in str(qv.estimate_vram(None, params=7e9))


def test_a_context_that_could_not_be_measured_is_not_said_to_be():
    store(MEASURED._replace(cuda_context=DEFAULT.cuda_context, kept=("cuda_context", "lazy_kernels")))
    assert "measured" not in str(qv.estimate_vram(SEVEN))
    assert str(current()).count(" default") == 2


def test_the_floor_of_a_token_changes_with_the_bandwidth():
    estimate = qv.estimate_vram(SEVEN)
    what = (estimate.architecture, estimate.profile, estimate.workload)
    before = decode_floor_ms(*what, current())
    assert decode_floor_ms(*what, MEASURED) / before == pytest.approx(
        DEFAULT.device_bandwidth / MEASURED.device_bandwidth
    )
    store(MEASURED)
    assert decode_floor_ms(*what, current()) == decode_floor_ms(*what, MEASURED)


def test_a_plan_counts_the_measured_context():
    budget = {"vram": "17GiB", "ram": "32GiB", "prompt_len": 4096}
    before = qv.plan(SEVEN, **budget)
    store(MEASURED._replace(cuda_context=DEFAULT.cuda_context + 2**30))
    after = qv.plan(SEVEN, **budget)
    assert before.profile.weights == after.profile.weights == "bf16"
    assert after.steps[0].needed_bytes - before.steps[0].needed_bytes > 2**29


@pytest.mark.parametrize(
    ("text", "name", "has"),
    [
        (
            "processor\t: 0\nmodel name\t: One\nflags\t\t: avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t: none\n",
            "One",
            True,
        ),
        ("processor\t: 0\nmodel name\t: Two\nflags\t\t: avx2 avx512f\n\n", "Two", False),
        ("processor\t: 0\nFeatures\t: asimd bf16\n\n", platform.machine(), False),
    ],
)
def test_the_cpu_is_described_by_its_first_processor(monkeypatch, tmp_path, text, name, has):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_info, "_FILE", str(tmp_path / "cpuinfo"))
    cpu_info._entries.cache_clear()
    assert (cpu_info.cpu_name(), cpu_info.has_4bit_kernel()) == (name, has)
    cpu_info._entries.cache_clear()


def test_a_plan_says_if_quantized_weights_are_slower_on_this_cpu(monkeypatch):
    budget = {"vram": {}, "ram": "64GiB", "prompt_len": 64, "max_new_tokens": 8}
    assert qv.plan(SEVEN, weights="nf4", **budget).notes[1:] == ()
    assert qv.plan(SEVEN, weights="bf16", **budget).notes[1:] == ()
    assert qv.plan(SEVEN, weights="int8-wo", **budget).notes[1:] == ()
    slower = "fp8 weights save memory and are slower than 16-bit ones on this CPU: "
    assert qv.plan(SEVEN, weights="fp8", **budget).notes[1].startswith(slower)
    monkeypatch.setattr(hardware, "has_4bit_kernel", lambda: False)
    plan, plain = (qv.plan(SEVEN, weights=weights, **budget) for weights in ("nf4", "bf16"))
    now, then = plan.times.ms_per_token, plain.times.ms_per_token
    assert plan.notes[1] == (
        "nf4 weights save memory and are slower than 16-bit ones on this CPU (it has no AVX512-BF16, which the kernel "
        f"needs): {now:.0f} ms a token, not {then:.0f}"
    )
    assert 5 < now / then < 9
    assert plan.notes[1] in str(plan)
    assert qv.plan(SEVEN, weights="nf4", vram="24GiB").notes[1:] == ()


def test_the_file_is_read_once_a_process(monkeypatch):
    store(MEASURED)
    qv.estimate_vram(SEVEN)
    monkeypatch.setattr(machine_file, "read", lambda: pytest.fail("read again"))
    assert qv.estimate_vram(SEVEN, prompt_len=77).machine == MEASURED


# Measuring


def test_steps_make_a_machine(monkeypatch):
    lines = []
    monkeypatch.setattr(calibrate, "run_step", FOUND.__getitem__)
    machine = calibrate.calibrate(say=lines.append)
    assert (machine.cuda_context, machine.lazy_kernels) == (400, 70)
    assert (machine.device_bandwidth, machine.pinned_copy_rate, machine.host_bandwidth) == (9, 5, 7)
    assert machine.disk_read_rate == 3
    assert (machine.layer_launch_time, machine.graph_node_time, machine.matmul_rate) == (600, 2, 11)
    assert (machine.host, machine.host_product_rate, machine.host_matmul_rate) == ("a CPU", 8, 12)
    assert current() == machine
    assert not machine.host_4bit_kernel
    assert lines == [
        "looking for a GPU",
        *(f"{number}/8 measuring {what}" for number, what in enumerate(calibrate.STEPS.values(), 1)),
    ]


def test_without_a_gpu_the_host_alone_is_measured(monkeypatch):
    lines = []
    monkeypatch.setattr(calibrate, "run_step", {**FOUND, "gpu": {"no_gpu": "torch sees none"}}.__getitem__)
    machine = calibrate.calibrate(say=lines.append)
    assert (machine.host_bandwidth, machine.host_product_rate, machine.disk_read_rate) == (7, 8, 3)
    assert (machine.host, machine.torch, machine.device) == ("a CPU", "2.11.0", DEFAULT.device)
    measured = {name for name in FIGURES if machine.is_measured(name)}
    assert measured == {"host_bandwidth", "host_product_rate", "host_matmul_rate", "disk_read_rate"}
    assert lines[:3] == [
        "looking for a GPU",
        "no NVIDIA GPU is measured (torch sees none): its figures stay those of an NVIDIA H200",
        "1/3 measuring copies within host memory",
    ]
    assert read().machines == {machine.key: machine}
    plan = qv.plan(SEVEN, vram="24GiB", ram="64GiB")
    assert (plan.times.machine, plan.times.measured) == (DEFAULT.device, False)


@pytest.mark.parametrize("hidden", ["context", "kernels-nf4"])
def test_a_driver_that_hides_processes_keeps_both_defaults_and_says_so(monkeypatch, hidden):
    lines = []
    monkeypatch.setattr(calibrate, "run_step", {**FOUND, hidden: {**FOUND[hidden], hidden: None}}.__getitem__)
    machine = calibrate.calibrate(say=lines.append)
    assert machine.kept == ("cuda_context", "lazy_kernels")
    assert (machine.cuda_context, machine.lazy_kernels) == (DEFAULT.cuda_context, DEFAULT.lazy_kernels)
    assert machine.device_bandwidth == 9
    assert "kept the default of cuda_context and lazy_kernels: the driver does not tell" in lines[-1]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), CalibrationError("no", what="rates")])
def test_an_early_end_stores_nothing(monkeypatch, folder, failure):
    def step(name):
        if name == "rates":
            raise failure
        return FOUND[name]

    monkeypatch.setattr(calibrate, "run_step", step)
    with pytest.raises(type(failure)):
        calibrate.calibrate(say=lambda line: None)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; print('noise', file=sys.stderr); sys.exit('out of memory')", "out of memory"),
        ("raise SystemExit(9)", "exit status 9"),
        ("print('nothing to tell')", "exit status 0"),
    ],
)
def test_a_step_that_fails_says_which_and_why(monkeypatch, code, why):
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options))
    with pytest.raises(
        CalibrationError, match=f"measuring copy rates of the GPU failed: {why}; nothing was stored"
    ) as raised:
        calibrate.run_step("rates")
    assert raised.value.what == "rates"


def test_a_step_that_hangs_is_ended(monkeypatch):
    real = subprocess.run
    code = "import time; time.sleep(60)"
    monkeypatch.setattr(calibrate, "_STEP_SECONDS", 0.2)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options))
    with pytest.raises(CalibrationError, match="no result after 0.2 seconds"):
        calibrate.run_step("rates")


def test_buffers_are_larger_than_caches_and_leave_room():
    sizes = {"least": 2**28, "where": "on the GPU"}
    assert calibrate_steps.buffer_size(80 * 2**30, **sizes) == 2**30
    assert calibrate_steps.buffer_size(2 * 2**30, **sizes) == 2**29
    assert calibrate_steps.buffer_size(80 * 2**30, least=2**31, where="on the GPU") == 2**31
    with pytest.raises(CalibrationError, match="bytes are free on the GPU, 1,073,741,824 are needed"):
        calibrate_steps.buffer_size(2**29, **sizes)


def test_host_memory_is_measured_without_a_gpu():
    assert 10**8 < calibrate_steps.host_bandwidth(2**24) < 10**13


def test_products_on_the_host_are_measured_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(calibrate_steps, "buffer_size", lambda free, **options: 2**22)
    monkeypatch.setattr(product_rates, "_MATRIX", (512, 256))  # some CPUs multiply in bf16 slowly
    monkeypatch.setattr(sys, "argv", ["calibrate_steps", "products"])
    calibrate_steps.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(calibrate_steps.RESULT))
    assert found["host"].endswith(" cores")
    assert 10**8 < found["host_product_rate"] < 10**13
    assert found["host_4bit_rate"] is None or 10**7 < found["host_4bit_rate"] < 10**13
    assert 10**9 < found["host_matmul_rate"] < 10**15


def test_a_file_from_before_a_figure_keeps_its_default_and_does_not_say_measured():
    old = {**MEASURED._asdict(), "kept": []}
    for name in ("host_matmul_rate", "matmul_rate", "layer_launch_time", "graph_node_time", "host"):
        del old[name]
    machine = parse_machine(old)
    assert machine.kept == ("matmul_rate", "layer_launch_time", "graph_node_time")
    assert machine.layer_launch_time == DEFAULT.layer_launch_time
    assert (machine.host, machine.host_matmul_rate) == ("", None)
    assert not machine.is_measured("layer_launch_time")
    assert machine.is_measured("device_bandwidth")


def test_a_disk_is_measured_without_a_gpu_and_left_as_it_was(monkeypatch, tmp_path):
    assert 10**6 < disk_rate.disk_read_rate(tmp_path, 2**27) < 10**13
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CalibrationError, match=r"cannot write a file of 134,217,728 bytes in '.*/gone'"):
        disk_rate.disk_read_rate(tmp_path / "gone", 2**27)
    monkeypatch.delattr(os, "posix_fadvise")
    assert disk_rate.disk_read_rate(tmp_path, 2**27) is None


def test_a_system_that_cannot_empty_its_page_cache_keeps_the_disks_default(monkeypatch):
    lines = []
    monkeypatch.setattr(calibrate, "run_step", {**FOUND, "disk": {"disk_read_rate": None}}.__getitem__)
    machine = calibrate.calibrate(say=lines.append)
    assert (machine.kept, machine.disk_read_rate) == (("disk_read_rate",), DEFAULT.disk_read_rate)
    assert lines[-1].startswith("kept the default of disk_read_rate: this system does not say")


# The command line


@pytest.mark.full
def test_a_real_host_is_measured_without_a_gpu(folder):
    result = run("calibrate", "--json", CUDA_VISIBLE_DEVICES="-1")
    assert result.returncode == 0, result.stderr
    machine = parse_machine(json.loads(result.stdout)["machine"])
    current.cache_clear()
    assert current() == machine
    assert [path.name for path in folder.iterdir()] == ["machines.json"]
    assert 1e9 < machine.host_product_rate < 1e12
    assert machine.host_4bit_kernel == (machine.host_4bit_rate is not None) == has_4bit_kernel()
    plan = qv.plan(SEVEN, vram={}, ram="64GiB", prompt_len=64, max_new_tokens=8)
    assert (plan.times.machine, plan.times.measured) == (machine.host, True)


def test_a_result_that_cannot_be_stored_is_json_where_json_was_asked_for(folder):
    (folder / "file").touch()
    result = run("calibrate", "--json", QWEN_VRAM_CACHE=str(folder / "file"))
    assert result.returncode == 2
    assert json.loads(result.stdout)["what"] == str(folder / "file" / "machines.json")


def test_show_prints_what_estimates_use():
    assert "nothing stored at" in run("calibrate", "--show").stdout
    store(MEASURED._replace(torch="2.10.0"))
    store(MEASURED)
    shown = qwen_vram("calibrate", "--show").stdout
    assert str(cache_file()) in shown.splitlines()[0]
    assert shown.splitlines()[1] == "NVIDIA GeForce RTX 4090, torch 2.11.0+cu130, driver 580.95.05, 2026-11-24"
    assert "400,000,000 bytes  measured" in shown
    data = json.loads(qwen_vram("calibrate", "--show", "--json").stdout)
    assert data["stored"]
    assert parse_machine(data["machine"]) == MEASURED
    assert [machine["torch"] for machine in data["others"]] == ["2.10.0"]


def test_reset_deletes_what_is_stored():
    store(MEASURED)
    assert json.loads(qwen_vram("calibrate", "--reset", "--json").stdout) == {
        "path": str(cache_file()),
        "deleted": True,
    }
    assert not cache_file().exists()
    assert qwen_vram("calibrate", "--reset").stdout == f"nothing was stored at {cache_file()}\n"


def test_show_and_reset_do_not_go_together():
    assert qwen_vram("calibrate", "--show", "--reset").returncode == 2


def test_an_estimate_on_the_command_line_uses_what_is_stored():
    store(MEASURED)
    data = json.loads(run("estimate", SEVEN, "--json").stdout)
    assert data["process_total"] - data["peak_reserved"] == 500_000_000
    assert data["machine"]["device"] == MEASURED.device


@pytest.mark.gpu
def test_a_real_gpu_is_measured(folder):
    result = run("calibrate", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    machine = parse_machine(json.loads(result.stdout)["machine"])
    print(machine)
    current.cache_clear()
    assert current() == machine
    assert [path.name for path in folder.iterdir()] == ["machines.json"]
    # A driver may hide what a process takes; what moves bytes can always be measured.
    assert set(machine.kept) <= {"cuda_context", "lazy_kernels"}
    assert 200e6 < machine.cuda_context < 2e9
    assert 0 <= machine.lazy_kernels < 1e9
    assert 2e9 < machine.pinned_copy_rate < 200e9
    assert 100e9 < machine.device_bandwidth < 10e12
    assert 1e9 < machine.host_bandwidth < 2e12
    assert 10e3 < machine.layer_launch_time < 20e6
    assert 500 < machine.graph_node_time < 50e3
    assert 1e12 < machine.matmul_rate < 1e16
    assert machine.device
    assert machine.driver != "unknown"
    assert set(FIGURES) <= set(machine._asdict())
