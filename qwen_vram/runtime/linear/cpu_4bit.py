"""Products of bitsandbytes' 4-bit matrices by its fused kernel on the CPU.

bitsandbytes loads one native library. Its library for a GPU lacks this kernel, which is in the library for the CPU, in
the same package. The kernel therefore also runs beside a GPU.
Source of layout and call: bitsandbytes 0.50.2, functional.py (_convert_weight_packed_for_cpu), backends/cpu/ops.py.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_vram.spec.formats import PACKED_ROWS

_HALF = PACKED_ROWS // 2


class PackedMatrix(NamedTuple):
    """A matrix (out_features, in_features) in the kernel's layout: codes by 32 rows, block maxima by columns."""

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int
    quant_type: str


def import_quietly() -> None:
    """Import bitsandbytes without the log line on CPUs with AVX512-BF16, which asks for a kernel hub."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)


@cache
def kernel_library() -> Any:
    """Return bitsandbytes' library for the CPU; `None` if it is missing, or if the CPU has no AVX512-BF16."""
    import_quietly()
    from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR

    try:
        library = ctypes.CDLL(str(PACKAGE_DIR / f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}"))
        runs = bool(library.has_avx512bf16_cpu())
    except (OSError, AttributeError):
        return None
    return library if runs else None


def pack(codes: Tensor, state: Any) -> PackedMatrix:
    """Return a packed copy of a 4-bit matrix on the host, from its `QuantState`: 4 bits a weight, and bf16 maxima."""
    from bitsandbytes.functional import dequantize_blockwise

    rows, columns = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    # Two rows at a distance of 16 share a byte, and the column pairs of 32 rows are contiguous.
    first, second = codes.view(torch.uint8).view(rows // PACKED_ROWS, 2, _HALF, columns // 2).unbind(1)
    pairs = torch.stack(((second & 0xF0) | (first >> 4), (second << 4) | (first & 0x0F)), dim=-1)
    packed = pairs.transpose(1, 2).contiguous().view(rows, columns // 2)
    maxima = absmax.view(rows, columns // state.blocksize).T.to(torch.bfloat16).contiguous()
    return PackedMatrix(packed, maxima, (rows, columns), state.blocksize, state.quant_type)


def multiply(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    """Return `x @ matrix.T + bias` in bf16: (..., in_features) to (..., out_features), in the dtype of `x`.

    Raises:
        ValueError: `x` is not on the CPU; the kernel would read host memory at a device address.
    """
    if x.device.type != "cpu":
        raise ValueError(f"the matrix is on the CPU, the input on {x.device}; call the decoder layer as a whole")
    rows, columns = matrix.shape
    flat = x.reshape(-1, columns).to(torch.bfloat16).contiguous()
    result = flat.new_empty(flat.shape[0], rows)
    call = getattr(kernel_library(), f"gemv_4bit_inference_cpu_{matrix.quant_type}_bf16")
    sizes = (flat.shape[0], rows, columns)
    pointers = (flat.data_ptr(), matrix.codes.data_ptr(), matrix.absmax.data_ptr(), result.data_ptr())
    call(
        *map(ctypes.c_int64, sizes),
        *map(ctypes.c_void_p, pointers),
        *map(ctypes.c_int64, (matrix.blocksize, flat.stride(0), result.stride(0))),
    )
    if bias is not None:
        result += bias
    return result.to(x.dtype).view(*x.shape[:-1], rows)
