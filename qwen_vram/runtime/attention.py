"""`attention="fused"`: torch's own flash kernel with grouped heads and no mask, registered with `transformers`.

transformers' sdpa builds an explicit mask as soon as a chunk follows a filled cache, and copies keys and values to
every query head for it. A causal chunk needs neither: the flash kernel aligns its causal mask at the bottom right and
reads grouped heads as they are. So does a decode step, for which sdpa may choose cuDNN on Hopper and Blackwell, which
builds a graph for every length that is new. Where padding needs a mask, torch's memory-efficient kernel is called for
the same reason, and because its answers do not change from run to run; a decode step's heads that share keys are its
rows, so that no key is copied. Every device but CUDA takes the plain sdpa path.

Source of the choice: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_prefer_cudnn_attention) and
cudnn/MHA.cpp (MHAGraphCache).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from qwen_vram.arithmetic.attention_kernels import bias_columns
from qwen_vram.planning.hardware import AMPERE
from qwen_vram.runtime.elementwise import kernels_on
from qwen_vram.runtime.fused_layers import FusedAttention
from qwen_vram.runtime.joined_attention import flash_attention, joined_attention, joins

NAME = "qwen_vram_fused"

# The flash kernel's own limit. Source: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
_LARGEST_HEAD = 256


def register() -> None:
    """Make `NAME` known to `transformers`; calling it again changes nothing."""
    AttentionInterface.register(NAME, fused_attention)
    AttentionMaskInterface.register(NAME, fused_mask)


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (batch, heads, q, head_dim) over `key` and `value` (batch, kv_heads, c, head_dim).

    Without a mask the last query sees all c keys and each one before it one key less. Returns (batch, q, heads,
    head_dim) and no weights.
    """
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None and not dropout and _takes(query, key, value, attention_mask):
        return _masked(query, key, value, attention_mask, scaling), None
    if attention_mask is not None:
        result, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result, None
    if queries == keys or not query.is_cuda:
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=queries > 1, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    # Joined by torch's own operators, parts in place would need more than was counted.
    padded = isinstance(module, FusedAttention) and kernels_on(query.device) is not None
    if joins(query, key, value, scaling, padded=padded):
        return joined_attention(query, key, value, scaling, padded=padded), None
    return flash_attention(query, key, value, scaling)[0], None


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Tell if `_masked` may be asked: the kernel itself looks neither at dtypes, which autocast mixes, nor at heads."""
    alike = query.dtype == key.dtype == value.dtype
    return query.is_cuda and alike and mask.dtype == torch.bool and mask.shape[1] == 1


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention by the memory-efficient kernel under a boolean mask, (batch, 1, q, c)."""
    batch, heads, queries, head_dim = query.shape
    groups = heads // key.shape[1]
    if queries == 1:
        query = query.reshape(batch, key.shape[1], groups, head_dim)
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bias = _bias(mask, query.dtype).expand(*query.shape[:3], -1)
    trains = any(one.requires_grad for one in (query, key, value))
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, trains, 0.0, False, scale=scaling
    )[0]
    return output.reshape(batch, 1, heads, head_dim) if queries == 1 else output.transpose(1, 2).contiguous()


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask is true, the least finite number elsewhere: a row without any true stays finite.

    Rows are as long as the kernel asks; sdpa would make such a copy of its own.
    """
    keys = mask.shape[-1]
    room = mask.new_empty((*mask.shape[:-1], bias_columns(keys)), dtype=dtype)
    return room[..., :keys].fill_(torch.finfo(dtype).min).masked_fill_(mask, 0)


def fused_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """No mask where the kernel's causal one says the same; sdpa's mask, (batch, 1, q, c), everywhere else.

    The kernel's mask is aligned at the bottom right, so the keys must end with the newest query: a static cache, whose
    keys run on, and packed sequences, for which `transformers` forbids the skip, get sdpa's mask.
    """
    ends_with_query = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    if torch.device(device).type == "cuda" and allow_is_causal_skip and ends_with_query:
        if attention_mask is None or bool(attention_mask.all()):
            return None
    result: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        # sdpa's skip over keys that run on is causal from the top left, ours from the bottom right.
        allow_is_causal_skip=allow_is_causal_skip and ends_with_query,
        device=device,
        **kwargs,
    )
    return result


def kernel_runs(dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    """Why the flash kernel cannot run here; empty where it can, and off CUDA, where the plain path is taken."""
    if device.type != "cuda":
        return ""
    if torch.cuda.get_device_capability(device) < AMPERE:
        return "the GPU is older than Ampere (compute capability 8.0)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel takes bf16 and fp16, not {dtype}"
    if head_dim > _LARGEST_HEAD or head_dim % 8:
        return f"head_dim {head_dim} is not a multiple of 8 of at most {_LARGEST_HEAD}"
    return ""
