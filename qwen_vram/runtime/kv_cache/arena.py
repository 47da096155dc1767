"""One block of memory for the KV cache of all layers on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen_vram.runtime.tensors.packed_layout import Key, Layout


class KvArena:
    """One block for the keys and values of `layers` layers, allocated when the first layer gets its tokens.

    Separate blocks for layers would lie between the activations of the first step, and fragment torch's allocator.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._taken = 0
        self._memory: Tensor | None = None

    def take(self, wanted: Mapping[Key, Tensor], device: torch.device) -> dict[Key, Tensor]:
        """Return the next layer's part on `device`: a tensor for each of `wanted`, which are on the meta device.

        The tensors are contiguous, sorted by the factors of two in their sizes, so each keeps the alignment of its
        size. Once every layer has its part, the block is freed with the last of them.

        Raises:
            ValueError: the earlier layers were on another device, or have another size.
        """
        layout = Layout(wanted)
        if self._memory is None:
            self._memory = torch.empty(self.layers * layout.nbytes, dtype=torch.uint8, device=device)
        if self._memory.device != device:
            raise ValueError(
                f"the cache's layers are on {self._memory.device} and on {device}, and share one block; say how many "
                "each device has: PreallocatedCache(..., split=(14, 14))"
            )
        if self._memory.nbytes != self.layers * layout.nbytes:
            raise ValueError(
                f"the cache's layers share one block of alike parts, and layer {self._taken} of them takes "
                f"{layout.nbytes:,} bytes where the first took {self._memory.nbytes // self.layers:,}; use "
                "cache='dynamic'"
            )
        start = self._taken * layout.nbytes
        part = self._memory[start : start + layout.nbytes]
        self._taken += 1
        if self._taken == self.layers:
            self._memory = None
        # Views share a version counter: a write to one layer would forbid gradients through earlier layers.
        return {name: view.data for name, view in layout.views(part).items()}


def rearranged(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return the sequences of `tensor` at `indices`, in its own memory if their number is the same."""
    chosen = tensor[indices]
    return tensor.copy_(chosen) if chosen.shape == tensor.shape else chosen


def like_states(states: Tensor, tokens: int) -> Tensor:
    """Return an empty tensor on the meta device for `tokens` tokens like (batch, kv_heads, q, head_dim) states."""
    return states.new_empty((*states.shape[:2], tokens, states.shape[-1]), device="meta")
