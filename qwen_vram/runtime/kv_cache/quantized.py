"""KV cache in 8 or 4 bits, with the newest tokens unquantized.

Keys are scaled per channel over 32 tokens, values per token and head.

A token is quantized once, when a whole group of 32 is older than the newest 128. Its scale and smallest value are
stored in float16, and its code is computed from the stored values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qwen_vram.runtime.kv_cache.arena import KvArena, like_states, rearranged
from qwen_vram.spec.kv_formats import KvFormat, kv_format

_LARGEST = torch.finfo(torch.float16).max


class Codes:
    """Quantized rows of one tensor: (batch, kv_heads, tokens, head_dim), the last dimension halved in 4 bits.

    A scale belongs to `span` tokens of one channel (keys), or to all channels of one token (values, `span` of 0).
    """

    def __init__(self, part: Sequence[Tensor], stored: KvFormat, span: int) -> None:
        self.data, self.scale, self.least = part
        self.stored, self.span = stored, span

    @staticmethod
    def wanted(like: Tensor, tokens: int, stored: KvFormat, span: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scales and smallest values for `tokens` tokens, on the meta device."""
        batch, heads, _, channels = like.shape
        shape = (batch, heads, tokens // span, channels) if span else (batch, heads, tokens, 1)
        codes = torch.empty((batch, heads, tokens, channels * stored.bits // 8), dtype=torch.uint8, device="meta")
        scale, least = (torch.empty(shape, dtype=torch.float16, device="meta") for _ in range(2))
        return codes, scale, least

    def write(self, rows: Tensor, start: int) -> None:
        """Quantize `rows` into the tokens from `start` on; both are multiples of `span`."""
        end = start + rows.shape[2]
        scales = slice(start // self.span, end // self.span) if self.span else slice(start, end)
        grouped = self._grouped(rows.to(torch.float32, copy=True))
        along = 3 if self.span else -1
        least, most = grouped.amin(along, keepdim=True), grouped.amax(along, keepdim=True)
        # Codes are computed from the rounded values. The scale of a constant group is not zero.
        least = least.clamp_(-_LARGEST, _LARGEST).half()
        scale = ((most - least.float()) / self.stored.largest_code).half().clamp_(min=torch.finfo(torch.float16).tiny)
        codes = grouped.sub_(least.float()).div_(scale.float()).round_().clamp_(0, self.stored.largest_code)
        codes = codes.to(torch.uint8).reshape(rows.shape)
        if self.stored.is_packed:
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << 4
        self.data[:, :, start:end] = codes
        self.scale[:, :, scales] = scale.squeeze(3) if self.span else scale
        self.least[:, :, scales] = least.squeeze(3) if self.span else least

    def read(self, end: int, out: Tensor) -> None:
        """Dequantize the first `end` tokens into `out`, (batch, kv_heads, end, head_dim)."""
        data = self.data[:, :, :end]
        if self.stored.is_packed:
            low, high = out.chunk(2, dim=-1)
            low.copy_(data & 15)
            high.copy_(data >> 4)
        else:
            out.copy_(data)
        scales = slice(0, end // self.span) if self.span else slice(0, end)
        grouped = self._grouped(out)
        scale, least = self.scale[:, :, scales], self.least[:, :, scales]
        if self.span:
            scale, least = scale.unsqueeze(3), least.unsqueeze(3)
        grouped.mul_(scale).add_(least)

    def _grouped(self, rows: Tensor) -> Tensor:
        """Return keys as (batch, kv_heads, groups, span, head_dim), and values unchanged."""
        if not self.span:
            return rows
        batch, heads, tokens, channels = rows.shape
        return rows.view(batch, heads, tokens // self.span, self.span, channels)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all stored tensors."""
        return self.data, self.scale, self.least

    def rebatch(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in that order."""
        self.data, self.scale, self.least = (rearranged(tensor, indices) for tensor in self.tensors())


class QuantizedStates(NamedTuple):
    """Keys or values of a layer: codes of the older tokens, and the others whole, (batch, kv_heads, tokens, head_dim).

    Attributes:
        newest: The first row is the first token that is not in `codes`.
        max_length: Tokens of each sequence, codes and whole ones.
    """

    codes: Codes
    newest: Tensor
    max_length: int

    def first(self, batch_size: int) -> QuantizedStates:
        """Return the first `batch_size` sequences, in the same memory."""
        part = [one[:batch_size] for one in self.codes.tensors()]
        return QuantizedStates(
            Codes(part, self.codes.stored, self.codes.span), self.newest[:batch_size], self.max_length
        )

    def age(self, quantized: int, older: int, held: int) -> None:
        """Quantize the tokens from `quantized` to `older` of `held` ones, and move later ones to the front."""
        count, left = older - quantized, held - older
        self.codes.write(self.newest[:, :, :count], quantized)
        self.newest[:, :, :left] = self.newest[:, :, count : count + left].clone()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all stored tensors."""
        return (*self.codes.tensors(), self.newest)


def quantized_states(
    like: Tensor, max_length: int, stored: KvFormat, arena: KvArena, device: torch.device
) -> tuple[QuantizedStates, QuantizedStates]:
    """Return memory for the keys and the values of a layer, as the next part of a block.

    Args:
        like: States (batch, kv_heads, q, head_dim), of which only the shape and the dtype are used.
    """
    tokens, newest = stored.quantized_tokens(max_length), like_states(like, stored.whole_tokens(max_length))
    of_keys = Codes.wanted(like, tokens, stored, stored.key_group)
    of_values = Codes.wanted(like, tokens, stored, 0)
    part = arena.take(dict(enumerate((*of_keys, *of_values, newest, newest))), device)
    *codes, new_keys, new_values = (part[index] for index in range(len(part)))
    return (
        QuantizedStates(Codes(codes[:3], stored, stored.key_group), new_keys, max_length),
        QuantizedStates(Codes(codes[3:], stored, 0), new_values, max_length),
    )


def stacked(layers: Sequence[QuantizedStates]) -> QuantizedStates:
    """Return the states of layers in one block as one tensor each, (layers, batch x kv_heads, tokens, head_dim)."""
    first, second = (layer.tensors() for layer in (layers[0], layers[min(1, len(layers) - 1)]))

    def every(one: Tensor, following: Tensor) -> Tensor:
        step = following.storage_offset() - one.storage_offset()
        merged = one.flatten(0, 1)
        return merged.as_strided((len(layers), *merged.shape), (step, *merged.stride()), one.storage_offset())

    *codes, newest = (every(one, following) for one, following in zip(first, second, strict=True))
    return QuantizedStates(Codes(codes, layers[0].codes.stored, layers[0].codes.span), newest, layers[0].max_length)


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values for `max_length` tokens: codes of the older ones, the newest unquantized.

    `keys` and `values` are the codes. Attention gets all tokens in the model's own dtype, dequantized at each step.
    """

    is_croppable = True

    def __init__(self, max_length: int, kv_cache: str, arena: KvArena | None = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.arena = arena or KvArena(1)
        self.stored = kv_format(kv_cache)
        self.quantized = 0
        self.whole = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.stored.bits

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory, in the dtype and on the device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._use(*quantized_states(key_states, self.max_length, self.stored, self.arena, self.device))
        self.is_initialized = True

    def _use(self, keys: QuantizedStates, values: QuantizedStates) -> None:
        self.key_codes, self.new_keys = keys.codes, keys.newest
        self.value_codes, self.new_values = values.codes, values.newest

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, q, head_dim) keys and values, and return all tokens, the appended ones exact.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.end_after(key_states)
        keys = self._all(self.key_codes, self.new_keys, key_states)
        values = self._all(self.value_codes, self.new_values, value_states)
        older = self.stored.quantized_tokens(end)
        if older > self.quantized:
            self.key_codes.write(keys[:, :, self.quantized : older], self.quantized)
            self.value_codes.write(values[:, :, self.quantized : older], self.quantized)
            self.quantized = older
        self.whole = end - self.quantized
        self.new_keys[:, :, : self.whole] = keys[:, :, self.quantized :]
        self.new_values[:, :, : self.whole] = values[:, :, self.quantized :]
        return keys, values

    def end_after(self, key_states: Tensor) -> int:
        """Return the number of tokens after (batch, kv_heads, q, head_dim) keys are appended.

        Raises:
            ValueError: more than `max_length`.
        """
        end = self.get_seq_length() + key_states.shape[-2]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens and was given {end}; make it longer: "
                "LoadedModel.new_cache(max_length=...)"
            )
        return int(end)

    def _all(self, codes: Codes, newest: Tensor, appended: Tensor) -> Tensor:
        """Return all tokens in the model's dtype; on the first call, the appended tensor itself."""
        held = self.get_seq_length()
        if not held:
            return appended
        shape = list(appended.shape)
        shape[2] = held + appended.shape[2]
        every = appended.new_empty(shape)
        if self.quantized:
            codes.read(self.quantized, every[:, :, : self.quantized])
        every[:, :, self.quantized : held] = newest[:, :, : self.whole]
        every[:, :, held:] = appended
        return every

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` more queries will see, and the first key's position."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.quantized + self.whole

    def set_length(self, length: int) -> None:
        """Set the number of tokens, after or before steps that write the newest one without `update`.

        Tokens that are old enough for `length` are quantized first, so `newest` has a row for the next token.
        """
        older = self.stored.quantized_tokens(length)
        if older > self.quantized:
            for codes, newest in ((self.key_codes, self.new_keys), (self.value_codes, self.new_values)):
                QuantizedStates(codes, newest, self.max_length).age(self.quantized, older, self.get_seq_length())
            self.quantized = older
        self.whole = length - self.quantized

    def get_max_length(self) -> int:
        """Return the number of tokens that can be held."""
        return self.max_length

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all stored tensors."""
        if not self.is_initialized:
            return ()
        return (*self.key_codes.tensors(), *self.value_codes.tensors(), self.new_keys, self.new_values)

    def reset(self) -> None:
        """Remove all tokens and keep the memory."""
        self.quantized = self.whole = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, at most those that are not quantized yet; the count may be negative.

        Raises:
            ValueError: the count includes quantized tokens.
        """
        count = abs(tokens_to_remove)
        if count > self.whole:
            raise ValueError(f"a quantized cache can forget its newest {self.whole} tokens here, not {count}")
        self.whole -= count

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.is_initialized:
            self._rebatch(torch.arange(self.new_keys.shape[0], device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        if self.is_initialized:
            self._rebatch(indices.to(self.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences in the order of `beam_idx`."""
        if self.is_initialized:
            self._rebatch(beam_idx.to(self.device))

    def _rebatch(self, indices: Tensor) -> None:
        self.key_codes.rebatch(indices)
        self.value_codes.rebatch(indices)
        self.new_keys = rearranged(self.new_keys, indices)
        self.new_values = rearranged(self.new_values, indices)
