"""The memory of a device's KV cache: one block for all of its layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen_vram.runtime.tensors.packed_layout import Key, Layout


class KvArena:
    """One block for the keys and values of `layers` layers, taken when the first of them gets its tokens.

    Taken layer by layer it would lie between the activations of the first step, and torch's allocator would fragment.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._taken = 0
        self._memory: Tensor | None = None

    def take(self, wanted: Mapping[Key, Tensor], device: torch.device) -> dict[Key, Tensor]:
        """The next layer's part on `device`: a tensor for each one `wanted`, given on the meta device.

        Their bytes lie side by side, those with more factors of two first, so that each keeps the alignment that its
        size has. Once every layer has its part, the block lives as long as one of them.

        Raises:
            ValueError: the layers before were on another device, or of another size.
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
        # Views share a version counter: one layer's write would forbid gradients through the layers before it.
        return {name: view.data for name, view in layout.views(part).items()}


def rearranged(tensor: Tensor, indices: Tensor) -> Tensor:
    """The sequences of `tensor` at `indices`, in its own memory where their number is the same."""
    chosen = tensor[indices]
    return tensor.copy_(chosen) if chosen.shape == tensor.shape else chosen


def like_states(states: Tensor, tokens: int) -> Tensor:
    """What room for `tokens` tokens takes beside (batch, kv_heads, q, head_dim) states, on the meta device."""
    return states.new_empty((*states.shape[:2], tokens, states.shape[-1]), device="meta")
