"""Times of products of few rows by this library's kernels."""

from __future__ import annotations

from qwen_vram.arithmetic.tiling import MANY_ROWS
from qwen_vram.arithmetic.timing.linear import Kernel, Matrices, product_seconds
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile

# The most rows of these kernels; with a 16-bit matrix, one. Source: runtime/linear/few_rows.py.
MOST_ROWS = 8
# Launches of a layer: q, k and v in one, o, gate and up in one, and down. Source: runtime/decoding/layer.py.
_LAYER_LAUNCHES = 4
# The rate of reading a matrix, as a multiple of a copy's rate: the head of 7B in bf16, 4.62 TB/s.
_READ_SHARE = 1.08
_MEMORY = float("inf")
# By format, then by rows. Each is from two equations, of a layer's launches and of the head. Rows in between are
# interpolated. fp4 counts as nf4. Matrices in 16 bits have one row only.
# measured: NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30, benchmarks/results/few_rows.jsonl, by the
# divisions of `few_rows._division`; gate and up of four and eight rows from products with one of them.
_NF4 = {1: Kernel(3.8e-6, 2.07e12), 4: Kernel(5.2e-6, 0.99e12), MOST_ROWS: Kernel(8.6e-6, 0.42e12)}
_INT8_WO = {1: Kernel(6.5e-6, _MEMORY), 4: Kernel(6.6e-6, 2.93e12), MOST_ROWS: Kernel(6.1e-6, 0.94e12)}
_FP8 = {1: Kernel(5.4e-6, _MEMORY), 4: Kernel(6.3e-6, 2.50e12), MOST_ROWS: Kernel(5.9e-6, 0.95e12)}
# int4 of 2026-12-01; its products of one row are by the division of the fastest one.
_INT4 = {1: Kernel(7.2e-6, 3.48e12), 4: Kernel(8.4e-6, 3.24e12), MOST_ROWS: Kernel(9.2e-6, 2.60e12)}
_DENSE = {1: Kernel(4.2e-6, _MEMORY)}
# Matrices in 4 bits with more rows, of one launch each, with that of x in the kernel's order. By rows, from two
# equations: gate_proj and k_proj of Qwen2.5-7B.
# measured: NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-12-01. gate_proj takes 30 us for 4 to 16 rows, 50 for 32
# and 61 for 64; k_proj takes 8, 10, 13 and 18.
_MANY = {
    MANY_ROWS[0]: Kernel(8.4e-6, 1.58e12),
    8: Kernel(8.4e-6, 1.58e12),
    16: Kernel(10.6e-6, 1.72e12),
    32: Kernel(13.4e-6, 0.95e12),
    MANY_ROWS[1]: Kernel(18.9e-6, 0.82e12),
}
_TIMES = {
    **{name: _NF4 for name, row in FORMATS.items() if row.is_bnb_4bit},
    **{name: _DENSE for name, row in FORMATS.items() if row.is_dense},
    "int4": _INT4,
    "int8-wo": _INT8_WO,
    "fp8": _FP8,
}


def by_few_rows(profile: Profile, name: str, rows: int) -> bool:
    """Tell if a product of `rows` rows with a matrix in the storage format `name` is made by these kernels on a GPU.

    Captured steps with fused kernels use them for all products. Other steps use them for formats with an own module.
    For int4 those use torch's kernel, which Python launches in less time.
    """
    storage, fused = FORMATS[name], profile.captured and profile.kernels == "fused"
    if profile.compiled or rows > (MANY_ROWS[1] if fused and storage.is_bnb_4bit else MOST_ROWS):
        return False
    if storage.is_dense:
        return fused and rows == 1
    return storage.few_rows and (storage.is_dequantized or fused or (profile.tiles and not storage.is_tinygemm))


def step_seconds(profile: Profile, name: str, of: Matrices, rows: int, machine: Machine) -> float:
    """Seconds of products of few rows with matrices in the storage format `name`, of a layer or of the head."""
    if not by_few_rows(profile, name, rows):
        return product_seconds(of, rows, machine, compiled=profile.compiled)
    fused = profile.captured and profile.kernels == "fused"
    many = fused and FORMATS[name].is_bnb_4bit and rows >= MANY_ROWS[0]
    launches = _LAYER_LAUNCHES if fused and of.number > 1 and not many else of.number
    kernels = _MANY if many else _TIMES[name]
    below = max(known for known in kernels if known <= rows)
    above = min(known for known in kernels if known >= rows)
    least, most = (_seconds(kernels[known], launches, of.nbytes, machine) for known in (below, above))
    return least if below == above else least + (most - least) * (rows - below) / (above - below)


def _seconds(kernel: Kernel, launches: int, nbytes: int, machine: Machine) -> float:
    return launches * kernel.start + nbytes / min(_READ_SHARE * machine.device_bandwidth, kernel.most)
