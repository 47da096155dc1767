"""Overhead: what libraries and driver take beside the tensors that a model asks for.

`workspace` is in torch's allocated bytes, the allocator's fragments only in its reserved bytes, and the CUDA context
with its kernels in neither: only nvidia-smi shows it.
"""

from __future__ import annotations

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.replay_generation import CUBLAS_WORKSPACE, replay_generation
from qwen_vram.arithmetic.replay_load import replay_load
from qwen_vram.arithmetic.weights import weight_bytes
from qwen_vram.arithmetic.workload import Workload

# nvidia-smi's figure less torch's reserved bytes, fresh process: the CUDA context after a load, and with the kernels
# that prefill and decode load on first use.
# measured: NVIDIA H200, driver 580, torch 2.11.0+cu130, transformers 5.17.0, 2026-11-22.
CUDA_CONTEXT = 649_068_544
LAZY_KERNELS = 186_000_000


def workspace_bytes(architecture: Architecture, profile: Profile) -> int:
    """What stays allocated at rest beside the weights' own bytes.

    cuBLAS's workspace, the rotary embedding's buffers, and what torch's allocator adds to the weights: each tensor is
    rounded up to 512 bytes, and up to 1 MiB of a large block that could not be split off stays with it.
    """
    resting = replay_load(architecture, profile).allocated - weight_bytes(architecture, profile).device
    return sum(CUBLAS_WORKSPACE) + resting


def load_peak_bytes(architecture: Architecture, profile: Profile) -> int:
    """The most that is allocated while loading, the tensor that is being quantized included."""
    return replay_load(architecture, profile).peak


def load_reserved_bytes(architecture: Architecture, profile: Profile) -> int:
    """What torch has reserved after loading."""
    return replay_load(architecture, profile).reserved


def reserved_bytes(architecture: Architecture, profile: Profile, workload: Workload) -> int:
    """What torch reserves in a fresh process that loads the model and runs the workload once.

    A replay of the allocator, some 10 ms. Fragments depend on the order of thousands of requests: a process that ran
    other lengths before holds more or less.
    """
    allocator = replay_load(architecture, profile).copy()
    replay_generation(allocator, architecture, profile, workload)
    return allocator.reserved


def process_bytes(peak_reserved: int) -> int:
    """What nvidia-smi shows for the process: reserved memory, the CUDA context, and kernels loaded on first use."""
    return peak_reserved + CUDA_CONTEXT + LAZY_KERNELS
