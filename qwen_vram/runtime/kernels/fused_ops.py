"""Element-by-element operations of a layer, as one kernel each if Triton runs.

Elsewhere torch's own operators compute the same. A result overwrites an argument, which saves the largest tensors of a
prefill. The caller must own the arguments, and there is no gradient.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from qwen_vram.planning.capacity.compiler import missing_compiler

_LOGGER = logging.getLogger(__name__)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm over the last dimension, in float32 and rounded before it is scaled, as in `transformers`."""
    kernels = kernels_on(x.device)
    if kernels is None or not x.is_contiguous():
        return functional.rms_norm(x, weight.shape, None, eps).mul_(weight)
    with _device_of(x):
        result: Tensor = kernels.rms_norm(x, weight, eps)
    return result


def multiply_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, stored in the memory of `gate`."""
    kernels = kernels_on(gate.device)
    if kernels is None or not (gate.is_contiguous() and up.is_contiguous()):
        return functional.silu(gate, inplace=True).mul_(up)
    with _device_of(gate):
        kernels.multiply_silu(gate, up)
    return gate


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate (batch, tokens, heads, head_dim) in place; `cos` and `sin` are (batch or 1, tokens, head_dim)."""
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
    """Join attention over two sets of keys into `out`, which may be one of the two results.

    All three are (batch, heads, q, head_dim). The log-sum-exps of the scores are (batch, heads, q, 1), in float32 and
    contiguous. `sums` is overwritten with that of both.
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
    """Return the kernels, if they run on `device`, compiled if Triton has not cached them; log once why not."""
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
        except Exception as error:  # a compiler can raise any error
            missing = f"a Triton that works ({str(error).strip()[:200]})"
        else:
            return triton_kernels
    _LOGGER.warning("kernels='fused' without %s: torch's own operators are used, and prefill is slower", missing)
    return None


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context with the tensor's device as the current one, on which Triton launches."""
    here = tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)
