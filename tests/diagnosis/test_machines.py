"""Faults planted into the description of a machine: each is found alone, and a good machine has none."""

import math
from dataclasses import replace

import pytest

import qwen_vram as qv
from qwen_vram.diagnosis import machine_facts
from qwen_vram.diagnosis.checks import gpu as gpu_checks
from qwen_vram.diagnosis.finding import Finding
from tests.helpers.machines import CPU_ONLY, GIB, H100, RTX_4090, VERSIONS, WITH_H100

MODEL = "Qwen2.5-7B-Instruct"
WEIGHTS = 15_231_233_024


def codes(model=MODEL, machine=WITH_H100, **lengths):
    return [one.code for one in qv.doctor(model, machine=machine, **lengths).findings]


def found(code, model=MODEL, machine=WITH_H100, **lengths):
    """The finding of a fault, which has to be the only one."""
    findings = qv.doctor(model, machine=machine, **lengths).findings
    assert [one.code for one in findings] == [code]
    return findings[0]


def setting(**variables):
    return replace(WITH_H100, settings=variables)


def without(package):
    return replace(WITH_H100, versions={name: one for name, one in VERSIONS.items() if name != package})


def with_gpu(**changes):
    return replace(WITH_H100, gpus=(replace(H100, **changes),))


@pytest.mark.parametrize("model", [None, MODEL])
@pytest.mark.parametrize("machine", [WITH_H100, CPU_ONLY], ids=["gpu", "cpu"])
def test_nothing_is_found_on_a_good_machine(machine, model):
    result = qv.doctor(model, machine=machine)
    assert result.is_good, str(result)
    assert result.reference == ("" if model else "Qwen/Qwen2.5-7B-Instruct")


PLANTED = {
    "allocator-rounding": setting(PYTORCH_CUDA_ALLOC_CONF="roundup_power2_divisions:1"),
    "allocator-no-caching": setting(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    "launch-blocking": setting(CUDA_LAUNCH_BLOCKING="1"),
    "module-loading": setting(CUDA_MODULE_LOADING="EAGER"),
    "link-width": with_gpu(width=4),
    "link-speed": replace(WITH_H100, pinned_rate=12e9),
    "gpu-shared": with_gpu(free=60 * GIB),
    "swapped": replace(WITH_H100, swapped=2 * GIB),
    "wsl-memory": replace(WITH_H100, is_wsl=True, ram_total=16 * GIB, ram_available=12 * GIB),
    "torch-cpu-build": replace(WITH_H100, versions={**VERSIONS, "torch": "2.13.0+cpu"}),
    "triton-missing": without("triton"),
    "compiler-missing": replace(WITH_H100, has_compiler=False),
}


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_fault_is_found_alone_with_and_without_a_model(code):
    for model in (None, MODEL):
        finding = found(code, model, PLANTED[code])
        assert (finding.cost_bytes or finding.cost_ms) > 0
        assert finding.found
        assert finding.fix


def test_settings_without_a_gpu_cost_nothing():
    for machine in PLANTED.values():
        if not machine.swapped:
            assert codes(None, replace(machine, gpus=(), is_wsl=False)) == []


def test_the_cost_of_a_narrow_link_is_the_time_of_the_missing_lanes():
    finding = found("link-width", machine=PLANTED["link-width"])
    lane = 3938.5e6  # PCIe 5.0
    assert finding.cost_ms == pytest.approx(1000 * WEIGHTS * (1 / (4 * lane) - 1 / (16 * lane)), rel=1e-3)


def test_an_idle_link_of_a_low_generation_is_no_fault():
    assert codes(machine=with_gpu(generation=1)) == []


@pytest.mark.parametrize(("size", "parts", "rounded"), [(5, 1, 8), (8, 1, 8), (1025, 4, 1280), (1200, 4, 1280)])
def test_sizes_are_rounded_as_by_the_allocator(size, parts, rounded):
    assert gpu_checks._rounded(size, parts) == rounded


def test_memory_of_other_processes_is_their_bytes():
    assert found("gpu-shared", machine=PLANTED["gpu-shared"]).cost_bytes == 20 * GIB
    own = with_gpu(free=60 * GIB, used_here=20 * GIB)
    assert codes(machine=own) == []


def test_fragments_are_those_of_the_replay():
    machine = replace(WITH_H100, gpus=(RTX_4090,), memlock=None)
    options = {"prompt_len": 24_000}
    findings = {one.code: one for one in qv.doctor(MODEL, machine=machine, **options).findings}
    estimate = qv.estimate_vram(MODEL, **options)
    assert findings["allocator-fragments"].cost_bytes == estimate.peak_reserved - estimate.peak_allocated
    expandable = replace(machine, settings={"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    assert "allocator-fragments" not in codes(machine=expandable, **options)


def test_a_growing_cache_costs_reserved_memory():
    machine, model, lengths = replace(WITH_H100, gpus=(RTX_4090,)), "Qwen2.5-0.5B-Instruct", {"batch_size": 16}
    findings = {one.code: one for one in qv.doctor(model, machine=machine, **lengths).findings}
    growing, fixed = (
        qv.estimate_vram(model, prompt_len=4096, cache=one, **lengths) for one in ("dynamic", "preallocated")
    )
    assert findings["cache-growing"].cost_bytes == growing.peak_reserved - fixed.peak_reserved


def test_a_small_card_gets_the_articles_findings():
    machine = replace(WITH_H100, gpus=(RTX_4090,))
    findings = {one.code: one for one in qv.doctor(MODEL, machine=machine).findings}
    nf4 = qv.estimate_vram(MODEL, "int4-flash").weights
    assert findings["weights-16bit"].cost_bytes == pytest.approx(WEIGHTS - nf4, rel=1e-3)
    assert set(findings) == {"weights-16bit", "prefill-whole"}


def test_a_card_that_is_too_small_gets_the_missing_bytes():
    card = replace(RTX_4090, total=12 * GIB, free=11 * GIB)
    findings = {one.code: one for one in qv.doctor(MODEL, machine=replace(WITH_H100, gpus=(card,))).findings}
    estimate = qv.estimate_vram(MODEL, prompt_len=4096)
    needed = estimate.peak_allocated + estimate.beside_torch
    assert findings["gpu-memory"].cost_bytes == pytest.approx(needed - 11 * GIB, rel=0.01)
    assert findings["gpu-memory"].severity == "high"
    assert "qwen-vram plan MODEL --vram 11264MiB" in findings["gpu-memory"].fix


def test_a_low_limit_of_locked_memory_is_found_if_layers_have_to_be_pinned():
    card = replace(RTX_4090, total=12 * GIB, free=11 * GIB)
    machine = replace(WITH_H100, gpus=(card,), memlock=64 * 2**20)
    findings = {one.code: one for one in qv.doctor(MODEL, machine=machine).findings}
    assert findings["memlock"].cost_bytes > GIB
    assert "memlock" not in codes(machine=replace(machine, memlock=None))
    assert "memlock" not in codes(machine=replace(WITH_H100, memlock=64 * 2**20))


def test_a_gpu_before_ampere_runs_no_flash_kernel():
    machine = with_gpu(capability=(7, 5))
    finding = found("attention-no-flash", machine=machine)
    eager, sdpa = (qv.estimate_vram(MODEL, prompt_len=4096, attention=one) for one in ("eager", "sdpa"))
    assert finding.cost_bytes == eager.peak_allocated - sdpa.peak_allocated
    assert "compute capability 7.5 is below 8.0 (Ampere)" in finding.found


def test_a_host_without_memory_for_the_model():
    machine = replace(CPU_ONLY, ram_available=8 * GIB)
    finding = found("host-memory", machine=machine)
    assert finding.cost_bytes > WEIGHTS - 8 * GIB


def test_a_finding_without_a_figure_is_refused():
    with pytest.raises(ValueError, match="finding 'x' has no figure; give cost_bytes or cost_ms"):
        Finding(code="x", severity="low", found="y", cost="z", fix="w")


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ({"prompt_len": 0}, "prompt_len must be a positive whole number, got 0"),
        ({"prompt_len": 200_000}, "past the model's max_position_embeddings"),
        ({"batch_size": True}, "batch_size must be a positive whole number, got True"),
    ],
    ids=str,
)
def test_a_wrong_length_is_refused(lengths, text):
    with pytest.raises(qv.WorkloadError, match=text):
        qv.doctor(MODEL, machine=WITH_H100, **lengths)


def test_a_wrong_model_is_refused():
    with pytest.raises(qv.UnknownNameError, match="unknown model 'Qwen9'"):
        qv.doctor("Qwen9", machine=WITH_H100)


def test_this_machine_is_examined():
    machine = machine_facts.examine_machine()
    assert machine.versions["qwen-vram"] == qv.__version__
    assert 0 < machine.ram_available <= machine.ram_total
    assert math.isfinite(machine.host_rate)
    assert machine.host_rate > 1e8
    assert machine.memlock is None or machine.memlock >= 0
    assert machine.pinned_rate is None


def test_a_named_compiler_has_to_exist(monkeypatch):
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert not machine_facts.examine_machine().has_compiler
