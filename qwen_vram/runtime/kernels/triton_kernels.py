"""Triton kernels of the operations in `fused_ops`.

Sums and roundings are those of `transformers`' modules.
"""

# Triton reads annotations as objects, so this module must not postpone their evaluation.

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of a program, by default
_QUERIES = 32  # of a head, joined by one program


# Lengths differ between prompts, and kernels are not compiled again for a new length.
@triton.jit(do_not_specialize=["rows"])
def _rms_norm(x, weight, out, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    place = row.to(tl.int64) * width + column
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, axis=1)[:, None] / width
    normed = (values * tl.rsqrt(mean + eps)).to(out.dtype.element_ty)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + place, (scale * normed.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `weight * (x / rms(x))` over the last dimension of a contiguous `x`."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    padded = triton.next_power_of_2(width)
    each = max(1, _ELEMENTS // padded)
    _rms_norm[(triton.cdiv(rows, each),)](x, weight, out, rows, width, eps, ROWS=each, WIDTH=padded, num_warps=8)
    return out


@triton.jit
def _multiply_silu(gate, up, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    values = tl.load(gate + place, mask=inside).to(tl.float32)
    other = tl.load(up + place, mask=inside).to(tl.float32)
    silu = (values / (1 + tl.exp(-values))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(gate + place, (silu * other).to(gate.dtype.element_ty), mask=inside)


def multiply_silu(gate: Tensor, up: Tensor) -> None:
    """Compute `gate = silu(gate) * up`, both contiguous."""
    count = gate.numel()
    _multiply_silu[(triton.cdiv(count, _ELEMENTS),)](gate, up, count, SIZE=_ELEMENTS, num_warps=8)


@triton.jit
def _turn(x, heads, token, cos_1, cos_2, sin_1, sin_2, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    dtype = x.dtype.element_ty
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    left = x + (token * heads + head) * (2 * half) + column
    right = left + half
    one = tl.load(left, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(right, mask=inside, other=0.0).to(tl.float32)
    new_one = (one * cos_1).to(dtype).to(tl.float32) + (-two * sin_1).to(dtype).to(tl.float32)
    new_two = (two * cos_2).to(dtype).to(tl.float32) + (one * sin_2).to(dtype).to(tl.float32)
    tl.store(left, new_one.to(dtype), mask=inside)
    tl.store(right, new_two.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["heads", "kv_heads", "places"])
def _rotate(
    query, key, cos, sin, heads, kv_heads, places, half,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    inside = column < half
    row = (token % places) * (2 * half) + column
    cos_1 = tl.load(cos + row, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + row + half, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + row, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + row + half, mask=inside, other=0.0).to(tl.float32)
    _turn(query, heads, token, cos_1, cos_2, sin_1, sin_2, half, HEADS, HALF)
    _turn(key, kv_heads, token, cos_1, cos_2, sin_1, sin_2, half, KV_HEADS, HALF)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate (batch, tokens, heads, head_dim) in place; `cos` and `sin` are (batch or 1, tokens, head_dim)."""
    batch, tokens, heads, head_dim = query.shape
    half, kv_heads = head_dim // 2, key.shape[2]
    _rotate[(batch * tokens,)](
        query, key, cos, sin, heads, kv_heads, cos.numel() // head_dim, half,
        HEADS=triton.next_power_of_2(heads), KV_HEADS=triton.next_power_of_2(kv_heads),
        HALF=triton.next_power_of_2(half), num_warps=4,
        enable_fp_fusion=False,  # with it, one of the two products would be added without rounding
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "queries", "total_b", "part_b", "out_b"])
def _join(
    total, sums, part, part_sums, out, heads, queries, width,
    total_b, total_h, total_q, part_b, part_h, part_q, out_b, out_h, out_q,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(1).to(tl.int64)
    batch, head = one // heads, one % heads
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = query < queries
    old = tl.load(sums + one * queries + query, mask=inside, other=0.0)
    some = tl.load(part_sums + one * queries + query, mask=inside, other=0.0)
    largest = tl.maximum(old, some)
    both = largest + tl.log(tl.exp(old - largest) + tl.exp(some - largest))
    tl.store(sums + one * queries + query, both, mask=inside)
    column = tl.arange(0, WIDTH)[None, :]
    row = query.to(tl.int64)[:, None]
    inside = inside[:, None] & (column < width)
    before = tl.load(total + batch * total_b + head * total_h + row * total_q + column, mask=inside, other=0.0)
    here = tl.load(part + batch * part_b + head * part_h + row * part_q + column, mask=inside, other=0.0)
    joined = before.to(tl.float32) * tl.exp(old - both)[:, None] + here.to(tl.float32) * tl.exp(some - both)[:, None]
    tl.store(out + batch * out_b + head * out_h + row * out_q + column, joined.to(out.dtype.element_ty), mask=inside)


def join(total: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor, out: Tensor) -> None:
    """Join attention over two sets of keys, (batch, heads, q, head_dim) each, into `out`, which may be one of them.

    Their log-sum-exps are contiguous, (batch, heads, q, 1); `sums` is overwritten with that of both.
    """
    batch, heads, queries, width = part.shape
    _join[(triton.cdiv(queries, _QUERIES), batch * heads)](
        total, sums, part, part_sums, out, heads, queries, width,
        *total.stride()[:3], *part.stride()[:3], *out.stride()[:3],
        QUERIES=_QUERIES, WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
