"""Attention of a chunk over a long past, in parts joined by their log-sum-exps.

torch has two kernels for a causal chunk. The mask of flash is aligned at the bottom right, as a chunk after a filled
cache needs it. The mask of cuDNN, which is twice as fast on Hopper, is aligned at the top left. All tokens of the chunk
see the keys long before it, without a mask. cuDNN computes that part, and flash or cuDNN the rest. cuDNN builds a graph
for every new length, so it gets few different lengths (`arithmetic.attention.attention_parts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from qwen_vram.arithmetic.attention import attention_parts, joined_rows
from qwen_vram.runtime.kernels import fused_ops


def joins(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, padded: bool = False) -> bool:
    """Tell if there is a long past and sdpa would use cuDNN for the chunk and its newest keys; never in training."""
    queries, keys = query.shape[2], key.shape[2]
    if not attention_parts(queries, keys - queries, padded=padded) or not query.dtype == key.dtype == value.dtype:
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
        return False
    choice: int = torch.ops.aten._fused_sdp_choice(
        query, key[:, :, -queries:], value[:, :, -queries:], None, 0.0, True, scale=scaling, enable_gqa=True
    )
    return choice == SDPBackend.CUDNN_ATTENTION.value


def joined_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, padded: bool = False
) -> Tensor:
    """Return causal attention of `query` (batch, heads, q, head_dim) over c >= q keys, (batch, kv_heads, c, head_dim).

    The result is (batch, q, heads, head_dim). A copy of it in float32 and three tensors of log-sum-exps are live beside
    it. With `padded` (`arithmetic.attention.joined_rows`) one kernel joins each part, and fewer tensors are live.
    """
    parts = _parts(query, key, value, scaling, padded=padded)
    if not padded:
        return join(parts).transpose(1, 2).contiguous()
    others = len(attention_parts(query.shape[2], key.shape[2] - query.shape[2], padded=True))
    return join_in_place(parts, others).transpose(1, 2).contiguous()


def _parts(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, padded: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield results (batch, heads, q, head_dim) and log-sum-exps (batch, heads, q, 1), oldest keys first."""
    queries, keys = query.shape[2], key.shape[2]
    ends = list(accumulate(attention_parts(queries, keys - queries, padded=padded)))
    rows = _filled(query, joined_rows(queries, padded=padded))
    for start, end in zip([0, *ends], ends, strict=False):
        result, sums = _cudnn(rows, key[:, :, start:end], value[:, :, start:end], scaling, causal=False)
        yield result[:, :, :queries], sums[:, :, :queries].contiguous()
        del result, sums
    del rows
    newest_key, newest_value = key[:, :, ends[-1] :], value[:, :, ends[-1] :]
    if newest_key.shape[2] == queries and queries == joined_rows(queries, padded=padded):
        yield _cudnn(query, newest_key, newest_value, scaling, causal=True)
        return
    result, sums = flash_attention(query, newest_key, newest_value, scaling)
    yield result.transpose(1, 2), sums.unsqueeze(-1)


def _filled(query: Tensor, rows: int) -> Tensor:
    """Return `query` with `rows` rows; the additional rows are never read."""
    batch, heads, queries, head_dim = query.shape
    if rows == queries:
        return query
    filled = query.new_zeros(batch, rows, heads, head_dim).transpose(1, 2)
    filled[:, :, :queries] = query
    return filled


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Return attention by torch's flash kernel, causal from the bottom right, with grouped heads.

    The results are (batch, q, heads, head_dim), and the log-sum-exp of each query's scores, (batch, heads, q).
    """
    states = [one.transpose(1, 2) for one in (query, key, value)]
    result, sums = torch.ops.aten._flash_attention_forward(
        *states, None, None, query.shape[2], key.shape[2], 0.0, True, False, scale=scaling
    )[:2]
    return result, sums


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    result, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, scale=scaling
    )[:2]
    return result, sums


def join(parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Return attention over all keys from results over parts of them, each with the log-sum-exp of its scores.

    The sum is in float32, and is rounded once.
    """
    result, sums = next(parts)
    dtype, total = result.dtype, result.float()
    del result  # no part's result is live while the next one is computed
    for result, some in parts:
        both = torch.logaddexp(sums, some)
        total.mul_(sums.sub_(both).exp_())
        total.addcmul_(result, some.sub_(both).exp_())
        sums = both
        del result, some, both
    return total.to(dtype)


def join_in_place(parts: Iterator[tuple[Tensor, Tensor]], others: int) -> Tensor:
    """Return the same attention, with one kernel for each part, and the result in the last part's memory.

    Args:
        others: The number of parts before the last one; two parts need no sum in float32.
    """
    total, sums = next(parts)
    if others > 1:
        batch, heads, queries, head_dim = total.shape
        wide = total.new_empty(batch, queries, heads, head_dim, dtype=torch.float32).transpose(1, 2)
        wide.copy_(total)
        total = wide
        del wide
    for number, (result, some) in enumerate(parts, start=1):
        out = result if number == others else total
        fused_ops.join(total, sums, result, some, out=out)
        del result, some
    return out
