"""Times of steps on the CPU: bytes over the rate of products, and Python's own time."""

from __future__ import annotations

from qwen_vram.arithmetic.kv_cache import all_kv_bytes
from qwen_vram.arithmetic.timing.bytes_moved import HOST_PRODUCT_RATE
from qwen_vram.arithmetic.timing.linear import Matrices, head_matrix, layer_matrices
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# Rates of the stated CPU, for a machine that was not measured.
# measured: AMD EPYC, 2 cores, torch 2.13.0, bitsandbytes 0.50.2, 2026-11-30, tools.product_rates, the fastest of eight.
HOST_NAME = "AMD EPYC, 2 cores"
HOST_4BIT_RATE = 19_500_000_000
HOST_MATMUL_RATE = 380_000_000_000
# Python's time for one layer, and for the rest of `generate`, in layers: 2.5 ms a token with 5 layers of 0.8 million
# weights in bf16. measured: the same CPU, 2026-11-25, benchmarks/results/backends_speed.jsonl.
_LAYER = 0.32e-3
_STEP_LAYERS = 1.5
# Time for a weight as a multiple of bf16's, for a format without a rate of its own. It is dequantized, or multiplied by
# a kernel that is slower than the memory.
# measured: the same CPU, benchmarks/results/cpu_times.jsonl (int4), backends_speed.jsonl (fp8). int8-wo: AMD EPYC with
# AVX2, cpu_products.jsonl, 0.60 and 0.52 for two matrices; int4 takes 0.71 there, and fp8 33.
_FORMAT_TIMES = {"int4": 1.65, "int8-wo": 0.56, "fp8": 13.0}
_OTHER_TIMES = 12.0
# The same for bitsandbytes' 4-bit weights on a CPU without its kernel: 8.6 and 9.1. They are dequantized for every
# product. measured: AMD EPYC with AVX2, torch 2.13.0, bitsandbytes 0.50.2, 2026-12-01, cpu_products.jsonl.
_WITHOUT_KERNEL = 8.9
# Rate of a prefill's products, as a share of the rate of a product of many rows with a large matrix.
_MATMUL_SHARE = 0.75
_SIXTEEN_BIT = 2


def product_rate_of(machine: Machine) -> int:
    """Bytes of 16-bit weights a second that the CPU multiplies with one row: measured, or stated."""
    return machine.host_product_rate or HOST_PRODUCT_RATE


def weights_seconds(of: Matrices, machine: Machine) -> float:
    """Seconds of a product of one row with matrices of one storage format."""
    rate = product_rate_of(machine)
    if of.storage.is_dense:
        return of.nbytes / rate
    if of.storage.is_bnb_4bit and not has_no_4bit_kernel(machine):
        return of.nbytes / (machine.host_4bit_rate or HOST_4BIT_RATE)
    other = _WITHOUT_KERNEL if of.storage.is_bnb_4bit else _OTHER_TIMES
    return _FORMAT_TIMES.get(of.storage.name, other) * _SIXTEEN_BIT * of.numel / rate


def has_no_4bit_kernel(machine: Machine) -> bool:
    """Tell if the CPU is known to have no kernel for 4-bit weights; a measured one without a rate has none."""
    if machine.host_product_rate is None:
        return not machine.host_4bit_kernel
    return machine.host_4bit_rate is None


def host_decode_seconds(
    architecture: Architecture, profile: Profile, workload: Workload, machine: Machine, tokens: int
) -> float:
    """Seconds of a decode step over `tokens` tokens of each sequence."""
    layers = architecture.num_hidden_layers
    seconds = layers * weights_seconds(layer_matrices(architecture, profile), machine)
    seconds += weights_seconds(head_matrix(architecture, profile), machine)
    held = all_kv_bytes(architecture, profile, tokens=tokens, batch_size=workload.batch_size)
    return seconds + held / product_rate_of(machine) + (layers + _STEP_LAYERS) * _LAYER


def host_prefill_seconds(
    architecture: Architecture, profile: Profile, workload: Workload, machine: Machine, chunks: int
) -> float:
    """Seconds of a prompt in `chunks` chunks, and of the head for its last token."""
    layers, rows = architecture.num_hidden_layers, workload.prompt_len * workload.batch_size
    layer, rate = layer_matrices(architecture, profile), machine.host_matmul_rate or HOST_MATMUL_RATE
    products = 2 * layers * layer.numel * rows / (_MATMUL_SHARE * rate)
    width = sum(one.attention.width for one in architecture.layers)
    attention = 2 * width * rows * workload.prompt_len / (_MATMUL_SHARE * rate)
    dequantizing = 0.0
    if not layer.storage.is_dense and (not layer.storage.is_bnb_4bit or has_no_4bit_kernel(machine)):
        dequantizing = chunks * layers * weights_seconds(layer, machine)
    head = weights_seconds(head_matrix(architecture, profile), machine)
    return products + attention + dequantizing + head + chunks * (layers + _STEP_LAYERS) * _LAYER
