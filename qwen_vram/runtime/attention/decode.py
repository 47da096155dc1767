"""Attention of one new token of every sequence over a cache that is filled from the front, by lengths on the device.

An operator of its own, so that a compiler sees one call: torch's flash kernel reads grouped heads as they are, only the
tokens that are there, and splits a long context over the GPU. Nothing is masked: padding at the front of a sequence is
where its keys begin.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


@torch.library.custom_op(
    "qwen_vram::decode_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor rows, Tensor starts, Tensor filled, float scale)"
    " -> Tensor",
)
def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, starts: Tensor, filled: Tensor, scale: float
) -> Tensor:
    """Attention of `query` (batch, heads, head_dim); returns as much.

    Args:
        keys, values: (batch x max_length, kv_heads, head_dim), one sequence after the other.
        rows: 0 to batch, in int32, as the kernel asks for it.
        starts: Where each sequence's first key is, and the end of the last one, (batch + 1,) in int32.
        filled: How many keys each sequence has from there on, (batch,) in int32.
        scale: What scores are multiplied by.
    """
    batch = query.shape[0]
    length = keys.shape[0] // batch
    if not query.is_cuda:
        return _plain(query, keys, values, starts, filled, scale)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        rows,
        starts,
        1,
        length,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=filled,
    )[0]
    return output.view(query.shape)


@decode_attention.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, starts: Tensor, filled: Tensor, scale: float
) -> Tensor:
    return torch.empty_like(query)


def _plain(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, filled: Tensor, scale: float) -> Tensor:
    """The same by a mask over the whole cache, where the flash kernel does not run."""
    batch = query.shape[0]
    keys, values = (one.view(batch, -1, *one.shape[1:]).transpose(1, 2) for one in (keys, values))
    places = torch.arange(batch * keys.shape[2], device=query.device).view(batch, 1, 1, -1)
    first = starts[:-1].view(-1, 1, 1, 1)
    seen = (places >= first) & (places < first + filled.view(-1, 1, 1, 1))
    output = functional.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return output[:, :, 0].contiguous()
