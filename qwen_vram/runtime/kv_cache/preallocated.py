"""KV cache that is allocated once for the whole context.

Nothing is copied as it grows, and nothing fragments the allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from qwen_vram.runtime.kv_cache.arena import KvArena, like_states, rearranged
from qwen_vram.runtime.kv_cache.quantized import QuantizedLayer
from qwen_vram.spec.kv_formats import KvFormatName, kv_format


class PreallocatedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (batch, kv_heads, max_length, head_dim) each, filled from the front.

    Attention reads the filled part as a view.
    """

    is_croppable = True

    def __init__(self, max_length: int, arena: KvArena | None = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.arena = arena or KvArena(1)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory, in the dtype and on the device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        wanted = {name: like_states(key_states, self.max_length) for name in ("keys", "values")}
        part = self.arena.take(wanted, self.device)
        self.keys, self.values = part["keys"], part["values"]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, q, head_dim) keys and values, and return all filled ones.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        end = self.end_after(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def end_after(self, key_states: Tensor) -> int:
        """Return the number of tokens after (batch, kv_heads, q, head_dim) keys are appended.

        Raises:
            ValueError: more than `max_length`.
        """
        end = self.length + key_states.shape[-2]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens and was given {end}; make it longer: "
                "LoadedModel.new_cache(max_length=...)"
            )
        return int(end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` more queries will see, and the first key's position."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.length

    def set_length(self, length: int) -> None:
        """Set the number of tokens, after or before steps that write the newest one without `update`."""
        self.length = length

    def get_max_length(self) -> int:
        """Return the number of tokens that can be held."""
        return self.max_length

    def reset(self) -> None:
        """Remove all tokens and keep the memory."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the count may be negative, as `transformers` passes it."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in that order, in the same memory if their number is the same."""
        if self.is_initialized:
            self.keys = rearranged(self.keys, indices.to(self.device))
            self.values = rearranged(self.values, indices.to(self.device))

    reorder_cache = batch_select_indices


class PreallocatedCache(Cache):  # type: ignore[misc]
    """A cache for `model.generate(past_key_values=...)` that never grows, with `max_length` tokens in every layer.

    `kv_cache` is `"bf16"` for the model's own dtype, `"int8"` or `"int4"`. Memory is allocated at the first token, in
    one block, with exactly the bytes that `arithmetic.kv_cache` predicts.

    Args:
        split: Layers of each GPU in order, for a model on several GPUs: each GPU has its own block.

    Raises:
        UnknownNameError: the format is not known.
    """

    def __init__(
        self,
        num_hidden_layers: int,
        *,
        max_length: int,
        kv_cache: KvFormatName = "bf16",
        split: Sequence[int] = (),
    ) -> None:
        layers: list[CacheLayerMixin] = []
        quantized = kv_format(kv_cache).is_quantized
        for count in split or (num_hidden_layers,):
            arena = KvArena(count)
            for _ in range(count):
                if quantized:
                    layers.append(QuantizedLayer(max_length, kv_cache, arena))
                else:
                    layers.append(PreallocatedLayer(max_length, arena))
        super().__init__(layers=layers)
        self.kv_cache = kv_cache


def cache_bytes(cache: Cache, device: torch.device | None = None) -> int:
    """Return the bytes of the tensors that a cache holds on devices, or only on `device` if it is given."""
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (layer.tensors() if hasattr(layer, "tensors") else (layer.keys, layer.values))
    ]
    # Layers on the host share their slots.
    held = {id(tensor): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return sum(tensor.nbytes for tensor in held.values() if device is None or tensor.device == device)
