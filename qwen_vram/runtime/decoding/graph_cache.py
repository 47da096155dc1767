"""Static KV buffers for captured decode steps, and the cache that borrows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache

from qwen_vram.runtime.kv_cache.arena import KvArena
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedLayer
from qwen_vram.runtime.kv_cache.quantized import QuantizedLayer, QuantizedStates, quantized_states, stacked
from qwen_vram.spec.kv_formats import KvFormat, KvFormatName, kv_format
from qwen_vram.spec.workload import Workload


class DecodeStep(Protocol):
    """The part of a decode step that generating needs; `graph_step.Step` is one."""

    def begin(self, length: int, padding: Tensor, positions: Tensor, quantized: int = 0) -> None:
        """Set the position of the next tokens."""

    def __call__(self, tokens: Tensor, quantized: int = 0) -> Tensor:
        """Feed one token of each sequence and return the logits."""
        ...


class Lender(Protocol):
    """The part of a decoder that a cache needs; `graph_decoder.Decoder` is one."""

    kv_cache: KvFormatName

    def lend(self, holder: BufferLease, batch_size: int) -> GraphBuffers:
        """Return buffers for a cache, which `holder` has until `release`."""
        ...

    def step(self, buffers: GraphBuffers, batch_size: int) -> DecodeStep:
        """Return the decode step of the first `batch_size` sequences of the buffers."""
        ...

    def release(self, holder: BufferLease) -> None:
        """Take the buffers back."""


class GraphBuffers:
    """Keys and values of every layer, in the layer's own sizes.

    Each is (batch_size, max_length, kv_heads, head_dim), or the memory of a quantized cache, in one block for all.
    """

    def __init__(self, model: Any, batch_size: int, max_length: int, kv_cache: KvFormatName = "bf16") -> None:
        self.batch_size, self.max_length, self.kv_cache = batch_size, max_length, kv_cache
        shapes = []
        for layer in model.model.layers:
            attention = layer.self_attn
            heads = attention.k_proj.out_features // attention.head_dim
            shapes.append((batch_size, max_length, heads, attention.head_dim))
        # Allocated outside inference mode, because inference tensors cannot be updated in place outside it.
        with torch.inference_mode(False):
            self.layers = (_quantized if self.is_quantized else _whole)(shapes, model, kv_format(kv_cache))

    @property
    def is_quantized(self) -> bool:
        """Tell if older tokens are stored as codes."""
        return kv_format(self.kv_cache).is_quantized

    @property
    def size(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        return self.batch_size, self.max_length

    def holds(self, batch_size: int, max_length: int) -> bool:
        """Tell if the buffers are large enough."""
        return batch_size <= self.batch_size and max_length <= self.max_length


def _whole(shapes: Sequence[tuple[int, ...]], model: Any, stored: KvFormat) -> list[tuple[Any, Any]]:
    """Return zero-filled keys and values for each layer, because masking does not remove NaNs."""
    where = {"dtype": model.dtype, "device": model.device}
    return [(torch.zeros(shape, **where), torch.zeros(shape, **where)) for shape in shapes]


def _quantized(shapes: Sequence[tuple[int, ...]], model: Any, stored: KvFormat) -> list[tuple[Any, Any]]:
    """Return the memory of a quantized cache for each layer."""
    arena, layers = KvArena(len(shapes)), []
    for batch_size, max_length, heads, head_dim in shapes:
        like = torch.empty((batch_size, heads, 1, head_dim), dtype=model.dtype, device="meta")
        layers.append(quantized_states(like, max_length, stored, arena, model.device))
    return layers


class BufferLease:
    """The claim of one cache to buffers, which it gets with its first tokens.

    Attributes:
        lender: The decoder that lends them.
        buffers: The buffers; `None` before the first tokens.
    """

    def __init__(self, lender: Lender, max_length: int) -> None:
        self.lender = lender
        self.max_length = max_length
        self.buffers: GraphBuffers | None = None

    def take(self, batch_size: int) -> GraphBuffers:
        """Return the buffers, which the lease holds until its release."""
        if self.buffers is None:
            self.buffers = self.lender.lend(self, batch_size)
        return self.buffers


class GraphLayer(PreallocatedLayer):
    """A layer of the buffers, filled from the front; attention sees (batch, kv_heads, tokens, head_dim) as a view."""

    def __init__(self, lease: BufferLease, number: int) -> None:
        super().__init__(lease.max_length)
        self._lease, self._number = lease, number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory for the batch of `key_states`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._see(key_states.shape[0])
        self.is_initialized = True

    def in_buffers(self) -> bool:
        """Tell if keys and values are in the buffers that a decode step reads."""
        return self.is_initialized and self.keys.data_ptr() == self.tensors()[0].data_ptr()

    @property
    def batch_size(self) -> int:
        """Number of sequences that are held."""
        return int(self.keys.shape[0])

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all memory that is held, also for sequences that are not used."""
        return () if self._lease.buffers is None else self._lease.buffers.layers[self._number]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put sequences into another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, outside the buffers if they hold fewer sequences."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        if not self.is_initialized:
            return
        count, buffers = len(indices), self._lease.buffers
        if buffers is None or count > buffers.batch_size or not self.in_buffers():
            super().batch_select_indices(indices)
            return
        keys, values = self.keys[indices.to(self.device)], self.values[indices.to(self.device)]
        self._see(count)
        self.keys.copy_(keys)
        self.values.copy_(values)

    def _see(self, batch_size: int) -> None:
        keys, values = self._lease.take(batch_size).layers[self._number]
        self.keys, self.values = keys[:batch_size].transpose(1, 2), values[:batch_size].transpose(1, 2)


class QuantizedGraphLayer(QuantizedLayer):
    """A layer of buffers that store older tokens as codes."""

    def __init__(self, lease: BufferLease, number: int) -> None:
        super().__init__(lease.max_length, lease.lender.kv_cache)
        self._lease, self._number = lease, number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Use the memory for the batch of `key_states`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._see(key_states.shape[0])
        self.is_initialized = True

    def in_buffers(self) -> bool:
        """Tell if keys and values are in the buffers that a decode step reads."""
        held = self._held()
        return self.is_initialized and held is not None and self.new_keys.data_ptr() == held[0].newest.data_ptr()

    def set_length(self, length: int) -> None:
        """Set the number of tokens, after the cache has quantized those of all layers that become old."""
        self.quantized = max(self.quantized, self.stored.quantized_tokens(length))
        self.whole = length - self.quantized

    @property
    def batch_size(self) -> int:
        """Number of sequences that are held."""
        return int(self.new_keys.shape[0])

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all memory that is held, also for sequences that are not used."""
        return tuple(tensor for states in self._held() or () for tensor in states.tensors())

    def _rebatch(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, outside the buffers if they hold fewer sequences."""
        count, buffers = len(indices), self._lease.buffers
        if buffers is None or count > buffers.batch_size or not self.in_buffers():
            super()._rebatch(indices)
            return
        chosen = [tensor[indices] for tensor in self._own()]
        self._see(count)
        for tensor, rows in zip(self._own(), chosen, strict=True):
            tensor.copy_(rows)

    def _own(self) -> tuple[Tensor, ...]:
        """Return the tensors of the sequences that are held."""
        return (*self.key_codes.tensors(), *self.value_codes.tensors(), self.new_keys, self.new_values)

    def _held(self) -> tuple[QuantizedStates, QuantizedStates] | None:
        return None if self._lease.buffers is None else self._lease.buffers.layers[self._number]

    def _see(self, batch_size: int) -> None:
        keys, values = self._lease.take(batch_size).layers[self._number]
        self._use(keys.first(batch_size), values.first(batch_size))


class GraphCache(Cache):  # type: ignore[misc]
    """A preallocated cache of `max_length` tokens over which `model.generate` runs captured decode steps."""

    def __init__(self, lender: Lender, *, num_hidden_layers: int, max_length: int) -> None:
        self.lease = BufferLease(lender, max_length)
        kind = QuantizedGraphLayer if kv_format(lender.kv_cache).is_quantized else GraphLayer
        super().__init__(layers=[kind(self.lease, number) for number in range(num_hidden_layers)])

    @property
    def quantized(self) -> int:
        """Number of tokens of each sequence that are codes."""
        return getattr(self.layers[0], "quantized", 0)

    def step(self) -> DecodeStep:
        """Return the decode step of the sequences that the cache holds; create it if it does not exist yet."""
        assert self.lease.buffers is not None
        return self.lease.lender.step(self.lease.buffers, self.layers[0].batch_size)

    def release(self) -> None:
        """Return the buffers to the lender; the cache is not used any more."""
        self.lease.lender.release(self.lease)

    def as_held(self, workload: Workload) -> Workload:
        """Return the workload that fills the buffers, with the same prompt."""
        buffers = self.lease.buffers
        if buffers is None:
            return workload
        new = buffers.max_length - workload.prompt_len
        return replace(workload, batch_size=buffers.batch_size, max_new_tokens=new)

    def in_buffers(self) -> bool:
        """Tell if all layers are in the buffers that a decode step reads, or will be with their first tokens."""
        return all(layer.in_buffers() or not layer.is_initialized for layer in self.layers)

    def set_length(self, length: int) -> None:
        """Set the number of tokens in the layers, which steps do not update; tokens that become old are quantized."""
        older = kv_format(self.lease.lender.kv_cache).quantized_tokens(length)
        if older > self.quantized and self.lease.buffers is not None:
            batch = self.layers[0].batch_size
            for states in zip(*self.lease.buffers.layers, strict=True):
                stacked([one.first(batch) for one in states]).age(self.quantized, older, self.get_seq_length())
        for layer in self.layers:
            layer.set_length(length)
