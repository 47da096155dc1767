"""The doctor on a machine with a GPU: real facts, real copies, and faults planted into real models."""

import pytest

import qwen_vram as qv
from qwen_vram.demo import CHECKPOINT
from qwen_vram.diagnosis.machine_facts import examine_machine

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

LENGTHS = {"prompt_len": 2048, "max_new_tokens": 64}
# Findings on the machine that runs the tests: other processes, its link, and its packages.
OF_THE_MACHINE = {
    "gpu-shared", "link-width", "link-speed", "triton-missing", "compiler-missing", "memlock", "wsl-memory",
    "launch-blocking", "allocator-no-caching", "module-loading",
}  # fmt: skip


def load(**options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map="cuda", **options)


def codes(model):
    return {one.code for one in qv.doctor(model, **LENGTHS).findings} - OF_THE_MACHINE


def test_a_good_model_on_a_gpu_has_no_finding():
    result = qv.doctor(load(), **LENGTHS)
    assert {one.code for one in result.findings} <= OF_THE_MACHINE
    assert (result.model.device, result.model.sdpa_backend) in (
        ("cuda", "FLASH_ATTENTION"),
        ("cuda", "CUDNN_ATTENTION"),
    )
    assert result.machine.gpus[0].total > 2**30
    assert result.machine.driver


def test_copies_are_measured_if_asked_for():
    machine = examine_machine(measure=True)
    assert machine.pinned_rate > machine.unpinned_rate > 1e8


def test_faults_on_a_gpu():
    import accelerate
    import torch

    assert codes(load(attn_implementation="eager")) == {"attention-eager"}
    assert "weights-fp32" in codes(load(dtype=torch.float32))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert "attention-no-flash" in codes(load())
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)
    model = load().cpu()
    assert "gpu-unused" in codes(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cuda", 0))
    assert {"offload-host", "offload-unpinned"} <= codes(model)
