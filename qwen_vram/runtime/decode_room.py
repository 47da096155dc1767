"""Rooms: keys and values whose place in memory stays, so that a decode step can be captured once and replayed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from qwen_vram.arithmetic.workload import Workload
from qwen_vram.runtime.kv_cache import PreallocatedLayer

if TYPE_CHECKING:
    from qwen_vram.runtime.decode_step import Step
    from qwen_vram.runtime.decoder import Decoder


class Room:
    """Keys and values of every layer, (batch_size, max_length, kv_heads, head_dim) each.

    Attributes:
        steps: The decode steps that were made over it, by how many of its sequences they feed.
    """

    def __init__(self, model: Any, batch_size: int, max_length: int) -> None:
        config = model.config
        head_dim = model.model.layers[0].self_attn.head_dim
        shape = (batch_size, max_length, config.num_key_value_heads, head_dim)
        where = {"dtype": model.dtype, "device": model.device}
        self.batch_size, self.max_length = batch_size, max_length
        self.steps: dict[int, Step] = {}
        # Zeros, for a mask takes no NaN away; and outside of inference mode, or nothing could write to them there.
        with torch.inference_mode(False):
            self.layers = [
                (torch.zeros(shape, **where), torch.zeros(shape, **where)) for _ in range(config.num_hidden_layers)
            ]

    @property
    def size(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        return self.batch_size, self.max_length

    def holds(self, batch_size: int, max_length: int) -> bool:
        """Tell if it is large enough."""
        return batch_size <= self.batch_size and max_length <= self.max_length


class Claim:
    """One cache's right to a room, which it gets with its first tokens."""

    def __init__(self, decoder: Decoder, max_length: int) -> None:
        self.decoder = decoder
        self.max_length = max_length
        self.room: Room | None = None

    def take(self, batch_size: int) -> Room:
        """The room, from now on."""
        if self.room is None:
            self.room = self.decoder.claim(self, batch_size)
        return self.room


class RoomLayer(PreallocatedLayer):
    """A layer of a room, filled from the front; attention sees (batch, kv_heads, tokens, head_dim) of it as a view."""

    def __init__(self, claim: Claim, number: int) -> None:
        super().__init__(claim.max_length)
        self._claim, self._number = claim, number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room's memory for so many sequences."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._see(key_states.shape[0])
        self.is_initialized = True

    def in_room(self) -> bool:
        """Tell if keys and values are where a decode step reads them."""
        return self.is_initialized and self.keys.data_ptr() == self.tensors()[0].data_ptr()

    def tensors(self) -> tuple[Tensor, ...]:
        """All memory that is held, for sequences that are not there too."""
        return () if self._claim.room is None else self._claim.room.layers[self._number]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put sequences into another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, outside of the room where it has not so many."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        if not self.is_initialized:
            return
        count, room = len(indices), self._claim.room
        if room is None or count > room.batch_size or not self.in_room():
            super().batch_select_indices(indices)
            return
        keys, values = self.keys[indices.to(self.device)], self.values[indices.to(self.device)]
        self._see(count)
        self.keys.copy_(keys)
        self.values.copy_(values)

    def _see(self, batch_size: int) -> None:
        keys, values = self._claim.take(batch_size).layers[self._number]
        self.keys, self.values = keys[:batch_size].transpose(1, 2), values[:batch_size].transpose(1, 2)


class RoomCache(Cache):  # type: ignore[misc]
    """A preallocated cache of `max_length` tokens over which `model.generate` runs compiled decode steps."""

    def __init__(self, decoder: Decoder, *, max_length: int) -> None:
        self.claim = Claim(decoder, max_length)
        count = decoder.model.config.num_hidden_layers
        super().__init__(layers=[RoomLayer(self.claim, number) for number in range(count)])

    def step(self) -> Step:
        """The decode step of the sequences that it holds; made now, where there is none yet."""
        assert self.claim.room is not None
        return self.claim.decoder.step(self.claim.room, self.layers[0].keys.shape[0])

    def release(self) -> None:
        """Give the room back; the cache is not used any more."""
        self.claim.decoder.release(self.claim)

    def as_held(self, workload: Workload) -> Workload:
        """The workload that fills the room, with the same prompt."""
        room = self.claim.room
        if room is None:
            return workload
        new = room.max_length - workload.prompt_len
        return replace(workload, batch_size=room.batch_size, max_new_tokens=new)

    def in_room(self) -> bool:
        """Tell if all layers are where a decode step reads them, or will be with their first tokens."""
        return all(layer.in_room() or not layer.is_initialized for layer in self.layers)

    def set_length(self, length: int) -> None:
        """What layers hold after steps that did not tell them."""
        for layer in self.layers:
            layer.length = length
