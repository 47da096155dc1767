"""KV cache in host memory: two device buffers hold the layers in use.

The memory is ordered by tokens, (max_length, 2, batch, kv_heads, head_dim), keys before values. The filled tokens are
therefore one block, which is copied over the link at once. The usual order would need a copy per head, or a temporary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from qwen_vram.arithmetic.kv_cache import HOST_CACHE_LAYERS
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedLayer

_LOGGER = logging.getLogger(__name__)


class HostCache(Cache):  # type: ignore[misc]
    """A cache of `max_length` tokens for `model.generate(past_key_values=...)`, with its layers in host memory.

    Memory is allocated at the first token: on the device exactly the bytes that `arithmetic.kv_cache` predicts. The
    host memory is pinned if possible; torch rounds a pinned block, one layer, up to a power of two.

    Args:
        split: Layers of each GPU in order, for a model on several GPUs: each GPU has its own slots.
    """

    def __init__(self, num_hidden_layers: int, *, max_length: int, split: Sequence[int] = ()) -> None:
        layers: list[HostLayer] = []
        for count in split or (num_hidden_layers,):
            slots = _Slots()
            part = [HostLayer(max_length, slots, index) for index in range(count)]
            slots.layers.extend(map(weakref.ref, part))
            layers.extend(part)
        super().__init__(layers=layers)


class HostLayer(PreallocatedLayer):
    """One layer's keys and values on the host, (batch, kv_heads, max_length, head_dim) each, filled from the front.

    Attention reads the filled part of a slot on the device, valid until the second layer after this one is updated.
    """

    def __init__(self, max_length: int, slots: _Slots, index: int) -> None:
        super().__init__(max_length)
        self.slots = slots
        self.index = index  # among the layers that share the slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the host memory, in the dtype of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.max_length, 2, *key_states.shape[:2], key_states.shape[-1])
        self._keep(self.slots.host_rows(shape, key_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, q, head_dim) keys and values, and return all filled ones, on the device.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        end = self.end_after(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slot = self.slots.holding(self)
        slot.keys[:, :, self.length : end] = key_states
        slot.values[:, :, self.length : end] = value_states
        self.slots.store(slot, self, end)
        return slot.keys[:, :, :end], slot.values[:, :, :end]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.rows.shape[2]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in that order, in the same memory if their number is the same."""
        if self.is_initialized:
            self.slots.forget()
            chosen = self.rows[: self.length, :, indices.cpu()]
            if chosen.shape[2] != self.rows.shape[2]:
                self._keep(self.slots.host_rows((self.max_length, *chosen.shape[1:]), self.rows))
            self.rows[: self.length] = chosen

    reorder_cache = batch_select_indices

    def _keep(self, rows: Tensor) -> None:
        self.rows = rows
        self.keys, self.values = _as_attention_reads(rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors on the device: the slots, which all layers share."""
        return tuple(slot.rows for slot in self.slots.open_slots)


class _Slot:
    """A buffer on the device for one layer. It holds the first `tokens` tokens of layer `index`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.keys, self.values = _as_attention_reads(rows)
        self.index: int | None = None
        self.tokens = 0
        self.filled = torch.cuda.Event() if rows.is_cuda else None  # type: ignore[no-untyped-call]


class _Slots:
    """The slots, and the stream of their copies in order; on the CPU the same copies run immediately.

    Because of the order, a token is on the host before it is fetched from there or overwritten in its slot.
    """

    def __init__(self) -> None:
        # Weak references: with a cycle, the memory of a dropped cache would wait for the garbage collector.
        self.layers: list[weakref.ref[HostLayer]] = []
        self.open_slots: list[_Slot] = []
        self.newest: _Slot | None = None
        self.stream: torch.cuda.Stream | None = None
        self.computed: torch.cuda.Event | None = None
        self.pinned = True

    def host_rows(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return host memory in the dtype of `like`, pinned for a GPU, or ordinary memory with a warning."""
        if self.pinned and (like.is_cuda or self.stream is not None):
            try:
                return torch.empty(shape, dtype=like.dtype, pin_memory=True)
            except RuntimeError as error:
                self.pinned = False
                text = "the KV cache stays in unpinned host memory, from which copies are slower: %s"
                _LOGGER.warning(text, str(error).splitlines()[0])
        return torch.empty(shape, dtype=like.dtype)

    def holding(self, layer: HostLayer) -> _Slot:
        """Return the slot with the layer's tokens after they have arrived; fetch them now if needed."""
        if not self.open_slots or self.open_slots[0].rows.shape != layer.rows.shape:
            self._open(layer)
        slot = self._find(layer)
        if slot is None:
            self._after_compute()
            slot = self._fetch(layer)
        if slot.filled is not None:
            # The stream of the layer's own device, which may differ from the current device.
            slot.filled.wait(torch.cuda.current_stream(slot.rows.device))
        self.newest = slot
        return slot

    def store(self, slot: _Slot, layer: HostLayer, end: int) -> None:
        """Copy the tokens up to `end` from a layer's slot to the host, and fetch the next layer's tokens."""
        self._after_compute()
        with self._copying():
            layer.rows[layer.length : end].copy_(slot.rows[layer.length : end], non_blocking=True)
        layer.length = slot.tokens = end
        following = self.layers[(layer.index + 1) % len(self.layers)]()
        if following is not None and self._find(following) is None:
            self._fetch(following)

    def forget(self) -> None:
        """Wait for every copy and mark the slots empty, because the tokens on the host are about to change."""
        if self.stream is not None:
            self.stream.synchronize()
        self.newest = None
        for slot in self.open_slots:
            slot.index = None

    def _open(self, layer: HostLayer) -> None:
        self.open_slots, self.newest = [], None
        if layer.device.type == "cuda" and self.stream is None:
            self.stream = torch.cuda.Stream(layer.device)  # type: ignore[no-untyped-call]
            self.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        for _ in range(min(len(self.layers), HOST_CACHE_LAYERS)):
            slot = _Slot(torch.empty_like(layer.rows, device=layer.device))
            if self.stream is not None:
                # The last prefetch may still run when the cache is dropped: its memory must not be reused before.
                slot.rows.record_stream(self.stream)
            self.open_slots.append(slot)

    def _find(self, layer: HostLayer) -> _Slot | None:
        return next((one for one in self.open_slots if one.index == layer.index and one.tokens >= layer.length), None)

    def _fetch(self, layer: HostLayer) -> _Slot:
        """Start copying a layer's tokens into the least recently used slot."""
        slot = next((slot for slot in self.open_slots if slot is not self.newest), self.open_slots[0])
        slot.index, slot.tokens = layer.index, layer.length
        with self._copying():
            if layer.length:  # before its first tokens a layer has no rows
                slot.rows[: layer.length].copy_(layer.rows[: layer.length], non_blocking=True)
            if slot.filled is not None:
                slot.filled.record()
        return slot

    def _after_compute(self) -> None:
        """Let copies wait for the present kernels: the slots' new tokens, and attention over the other slot."""
        if self.stream is not None and self.computed is not None:
            self.computed.record(torch.cuda.current_stream(self.stream.device))
            self.stream.wait_event(self.computed)

    def _copying(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


def _as_attention_reads(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of (tokens, 2, batch, kv_heads, head_dim) as views (batch, kv_heads, tokens, head_dim)."""
    keys, values = rows.permute(1, 2, 3, 0, 4)
    return keys, values
