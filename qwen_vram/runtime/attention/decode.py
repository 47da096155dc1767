"""Attention of one new token per sequence, over a cache with lengths on the device.

It is a custom operator, so a compiler sees one call. torch's flash kernel reads grouped heads without copies and only
the filled part of the cache, and divides a long context over the GPU. Nothing is masked: the keys of a sequence begin
after the padding at its front.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qwen_vram.runtime.kv_cache.quantized import QuantizedStates
from qwen_vram.spec.batching.pages import PAGE


@torch.library.custom_op(
    "qwen_vram::decode_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor rows, Tensor starts, Tensor filled, float scale)"
    " -> Tensor",
)
def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, starts: Tensor, filled: Tensor, scale: float
) -> Tensor:
    """Return attention of `query` (batch, heads, head_dim), in the same shape.

    Args:
        keys, values: (batch x max_length, kv_heads, head_dim), one sequence after the other.
        rows: 0 to batch, in int32, as the kernel requires.
        starts: The row of each sequence's first key, and the end of the last sequence, (batch + 1,) in int32.
        filled: The number of keys of each sequence from there on, (batch,) in int32.
        scale: The factor of the scores.
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
    """Return the same attention with a mask over the whole cache, if the flash kernel does not run."""
    batch = query.shape[0]
    keys, values = (one.view(batch, -1, *one.shape[1:]).transpose(1, 2) for one in (keys, values))
    places = torch.arange(batch * keys.shape[2], device=query.device).view(batch, 1, 1, -1)
    first = starts[:-1].view(-1, 1, 1, 1)
    seen = (places >= first) & (places < first + filled.view(-1, 1, 1, 1))
    output = functional.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return output[:, :, 0].contiguous()


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, filled: Tensor, scale: float) -> Tensor:
    """Return the attention of `decode_step` over pages by torch's operators, where no kernel runs.

    It gathers the pages of each sequence.

    Args:
        query: (batch, heads, head_dim), rotated.
        keys, values: (pages x PAGE, kv_heads, head_dim).
        pages: Numbers of each sequence's pages, (batch, pages).
        filled: The number of keys of each sequence, (batch,).
    """
    batch, count = pages.shape
    inside = torch.arange(PAGE, device=pages.device)
    rows = (pages[:, :, None].long() * PAGE + inside).flatten()
    starts = torch.arange(batch + 1, device=pages.device) * (count * PAGE)
    return _plain(query, keys.index_select(0, rows), values.index_select(0, rows), starts, filled, scale)


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    starts: Tensor,
    filled: Tensor,
    scale: float,
    quantized: Tensor,
) -> Tensor:
    """Return the attention of `decode_step` over a quantized cache by torch's operators, where no kernel runs.

    It dequantizes the whole cache, and reads lengths from the device.

    Args:
        query: (batch, heads, head_dim), rotated, as `key`, which is stored with `value` first.
        quantized: Number of tokens that are codes, (1,).
    """
    batch, older = query.shape[0], int(quantized)
    last = starts[:-1] - torch.arange(batch, device=starts.device) * keys.max_length + filled - 1

    def whole(states: QuantizedStates, appended: Tensor) -> Tensor:
        row = int(last[0]) - older
        count = row + 1 if row < states.newest.shape[2] else 0  # a rehearsal has no row for its token
        if count:
            states.newest[:, :, row] = appended
        every = torch.zeros(batch, states.max_length, *appended.shape[1:], dtype=query.dtype, device=query.device)
        held = every.transpose(1, 2)
        if older:
            states.codes.read(older, held[:, :, :older])
        held[:, :, older : older + count] = states.newest[:, :, :count]
        return every.flatten(0, 1)

    return _plain(query, whole(keys, key), whole(values, value), starts, filled, scale)
