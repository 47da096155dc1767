"""What is done element by element between a layer's matrix products: one kernel each where Triton runs.

Everywhere else torch's own operators do the same. Results go where an argument was, so that the largest tensors of a
prefill are fewer; arguments must be the caller's own, and no gradient wanted.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from shutil import which
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

_LOGGER = logging.getLogger(__name__)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in float32 and rounded before it is scaled, as `transformers` does it."""
    kernels = kernels_on(x.device)
    if kernels is None or not x.is_contiguous():
        return functional.rms_norm(x, weight.shape, None, eps).mul_(weight)
    with _device_of(x):
        result: Tensor = kernels.rms_norm(x, weight, eps)
    return result


def multiply_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, in the memory of `gate`."""
    kernels = kernels_on(gate.device)
    if kernels is None or not (gate.is_contiguous() and up.is_contiguous()):
        return functional.silu(gate, inplace=True).mul_(up)
    with _device_of(gate):
        kernels.multiply_silu(gate, up)
    return gate


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding in place: (batch, tokens, heads, head_dim); `cos` and `sin` (batch or 1, tokens, head_dim)."""
    kernels = kernels_on(query.device)
    if kernels is not None and all(one.is_contiguous() for one in (query, key, cos, sin)):
        with _device_of(query):
            kernels.rotate(query, key, cos, sin)
        return
    for heads in (query, key):
        left, right = heads.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1).mul_(sin.unsqueeze(2))
        heads.mul_(cos.unsqueeze(2)).add_(turned)


def join(total: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor, out: Tensor) -> None:
    """Attention over some keys and over others, joined into `out`, which may be one of the two.

    All three are (batch, heads, q, head_dim); their scores' log-sum-exps (batch, heads, q, 1), in float32 and
    contiguous. `sums` becomes that of both.
    """
    kernels = kernels_on(total.device)
    if kernels is not None:
        with _device_of(total):
            kernels.join(total, sums, part, part_sums, out)
        return
    both = torch.logaddexp(sums, part_sums)
    joined = total.float() * (sums - both).exp_()
    out.copy_(joined.addcmul_(part, (part_sums - both).exp_()))
    sums.copy_(both)


@lru_cache(maxsize=16)
def kernels_on(device: torch.device) -> ModuleType | None:
    """The kernels, if they run on `device`; says once why not. They are compiled here, for what Triton has not yet."""
    if device.type != "cuda":
        return None
    missing = missing_compiler()
    if not missing:
        from qwen_vram.runtime.kernels import triton_kernels

        try:
            with torch.cuda.device(device):
                row = torch.ones(16, dtype=torch.float32, device=device)
                triton_kernels.rms_norm(row, row, 1e-6)
                torch.cuda.synchronize(device)
        except Exception as error:  # whatever a compiler on somebody's machine may raise
            missing = f"a Triton that works ({str(error).strip()[:200]})"
        else:
            return triton_kernels
    _LOGGER.warning("kernels='fused' without %s: torch's own operators are used, and prefill is slower", missing)
    return None


def missing_compiler() -> str:
    """What it takes to compile kernels and is not here; empty where nothing is missing."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    if not any(which(name) for name in compilers if name):
        return "a C compiler"
    return "Triton" if find_spec("triton") is None else ""


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    here = tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)
