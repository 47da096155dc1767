"""`attention="fused"`: torch's flash kernel with grouped heads and no mask.

transformers' sdpa builds an explicit mask if a chunk follows a filled cache, and then copies keys and values for every
query head. A causal chunk needs neither: the flash kernel aligns its causal mask at the bottom right and reads grouped
heads without copies. The same holds for a decode step. sdpa may choose cuDNN for it on Hopper and Blackwell, which
builds a graph for every new length.

If padding needs a mask, torch's memory-efficient kernel runs for the same reason, and because its results do not change
from run to run. In a decode step the heads that share keys are its rows, so no key is copied. Devices other than CUDA
use the plain sdpa path.

Source of the choice: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_prefer_cudnn_attention) and
cudnn/MHA.cpp (MHAGraphCache).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from qwen_vram.arithmetic.attention import bias_columns
from qwen_vram.planning.capacity.hardware import AMPERE
from qwen_vram.runtime.attention.split_kv import flash_attention, joined_attention, joins
from qwen_vram.runtime.kernels.fused_layers import FusedAttention
from qwen_vram.runtime.kernels.fused_ops import kernels_on

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
    """Return attention of `query` (batch, heads, q, head_dim) over `key` and `value` (batch, kv_heads, c, head_dim).

    Without a mask the last query sees all c keys, and each earlier query sees one key less. With `cu_seq_lens_q` and
    `max_length_q`, as `transformers` names them, some sequences without a cache are packed one after the other. The
    result is (batch, q, heads, head_dim), without attention weights.
    """
    queries, keys = query.shape[2], key.shape[2]
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None and attention_mask is None and queries == keys:
        return packed_attention(query, key, value, bounds, int(kwargs["max_length_q"]), scaling), None
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
    # torch's own operators would need more memory than was counted to join parts in place.
    padded = isinstance(module, FusedAttention) and kernels_on(query.device) is not None
    if joins(query, key, value, scaling, padded=padded):
        return joined_attention(query, key, value, scaling, padded=padded), None
    return flash_attention(query, key, value, scaling)[0], None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """Return causal attention within packed sequences, (1, q, heads, head_dim).

    Args:
        query: (1, heads, q, head_dim), as `key` and `value` with their heads.
        bounds: The first place of each sequence, and the end of the last one, (sequences + 1,) in int32.
        longest: Tokens of the longest sequence.
    """
    if query.is_cuda:
        packed = [states[0].transpose(0, 1) for states in (query, key, value)]
        output: Tensor = torch.ops.aten._flash_attention_forward(
            *packed, bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
        )[0]
        return output[None]
    ends = bounds.tolist()
    parts = []
    for start, end in pairwise(ends):
        one, keys, values = (states[:, :, start:end] for states in (query, key, value))
        parts.append(
            functional.scaled_dot_product_attention(one, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Tell if `_masked` can run, because the kernel itself checks neither dtypes, which autocast mixes, nor heads."""
    alike = query.dtype == key.dtype == value.dtype
    return query.is_cuda and alike and mask.dtype == torch.bool and mask.shape[1] == 1


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Return attention by the memory-efficient kernel under a boolean mask, (batch, 1, q, c)."""
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
    """Return 0 for true entries of a mask and the least finite number for others, so a row without true stays finite.

    Rows have the length that the kernel requires; sdpa would make such a copy itself.
    """
    keys = mask.shape[-1]
    wide = mask.new_empty((*mask.shape[:-1], bias_columns(keys)), dtype=dtype)
    return wide[..., :keys].fill_(torch.finfo(dtype).min).masked_fill_(mask, 0)


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
    """Return `None` if the kernel's causal mask is sufficient, otherwise sdpa's mask, (batch, 1, q, c).

    The kernel's mask is aligned at the bottom right, so the keys must end with the newest query. A static cache has
    keys after it, and `transformers` forbids the skip for packed sequences: both get sdpa's mask.
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
        # sdpa's skip for keys after the newest query is causal from the top left, ours from the bottom right.
        allow_is_causal_skip=allow_is_causal_skip and ends_with_query,
        device=device,
        **kwargs,
    )
    return result


def kernel_runs(dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    """Return why the flash kernel cannot run here; empty if it can, and outside CUDA, which uses the plain path."""
    if device.type != "cuda":
        return ""
    if torch.cuda.get_device_capability(device) < AMPERE:
        return "the GPU is older than Ampere (compute capability 8.0)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel takes bf16 and fp16, not {dtype}"
    if head_dim > _LARGEST_HEAD or head_dim % 8:
        return f"head_dim {head_dim} is not a multiple of 8 of at most {_LARGEST_HEAD}"
    return ""
