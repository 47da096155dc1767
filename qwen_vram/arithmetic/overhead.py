"""Overhead: what libraries and driver take beside the tensors that a model asks for.

`workspace` is in torch's allocated bytes, the allocator's fragments only in its reserved bytes, and the CUDA context
with its kernels in neither: only nvidia-smi shows it.
"""

from __future__ import annotations

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.storage import ALLOCATION_STEP, FORMATS
from qwen_vram.arithmetic.weights import largest_tensor_bytes, weight_bytes

# cuBLAS's workspace (32 MiB) and cuBLASLt's (1 MiB), which torch keeps per stream.
# measured: NVIDIA H200, torch 2.11.0+cu130, 2026-11-22; older GPUs take 8,519,680 + 1,048,576 bytes.
CUBLAS_WORKSPACE = 34_603_008

# The rotary embedding's two float32 buffers of head_dim / 2, one allocation step each.
ROTARY_BUFFERS = 2 * ALLOCATION_STEP

# nvidia-smi's figure less torch's reserved bytes, fresh process: the CUDA context after a load, and with the kernels
# that prefill and decode load on first use.
# measured: NVIDIA H200, driver 580, torch 2.11.0+cu130, transformers 5.17.0, 2026-11-22.
CUDA_CONTEXT = 649_068_544
LAZY_KERNELS = 186_000_000

# torch takes device memory in segments of this for requests between 1 MiB and 10 MiB, and in multiples of 2 MiB above.
# Source: c10/cuda/CUDACachingAllocator.cpp, kLargeBuffer and kRoundLarge.
SEGMENT_STEP = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20


def workspace_bytes(architecture: Architecture, profile: Profile) -> int:
    """What the libraries keep allocated: cuBLAS's workspace, rotary buffers, each weight rounded up to 512 bytes."""
    return CUBLAS_WORKSPACE + ROTARY_BUFFERS + weight_bytes(architecture, profile).rounding


def reserved_bytes(peak_allocated: int, transient: int) -> int:
    """What torch reserves for a peak of `peak_allocated`, of which `transient` bytes come and go in large blocks.

    Blocks of many sizes leave holes that the next size does not fill: measured on the rows of tests/data, up to
    0.45 of what comes and goes.
    """
    fragments = transient * 45 // 100
    return -(-(peak_allocated + fragments) // SEGMENT_STEP) * SEGMENT_STEP + LARGE_SEGMENT


def process_bytes(peak_reserved: int) -> int:
    """What nvidia-smi shows for the process: reserved memory, the CUDA context, and kernels loaded on first use."""
    return peak_reserved + CUDA_CONTEXT + LAZY_KERNELS


def load_peak_bytes(architecture: Architecture, profile: Profile) -> int:
    """The most that is allocated while loading: the final weights and the largest tensor still in the model's dtype."""
    stored = weight_bytes(architecture, profile)
    in_flight = largest_tensor_bytes(architecture, profile)
    if FORMATS[profile.weights].name == "int8":
        # The codes and the fp16 copy they are made of are alive together.
        in_flight += in_flight // 2
    return stored.device + stored.rounding + ROTARY_BUFFERS + in_flight
