"""Paged KV cache: pages that the requests of a batch share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from qwen_vram.spec.batching.pages import PAGE, pages_of, pool_pages

States = tuple[Tensor, Tensor]


class PagePool:
    """Keys and values of every layer, (pages x PAGE, kv_heads, head_dim) each, and the list of free pages.

    Page 0 belongs to no request.

    Args:
        requests: The most requests of `context_len` tokens.
    """

    def __init__(self, model: Any, requests: int, context_len: int) -> None:
        self.context_len = context_len
        pages = pool_pages(requests, context_len)
        self.layers: list[States] = []
        # Allocated outside inference mode, because inference tensors cannot be updated in place outside it.
        with torch.inference_mode(False):
            for layer in model.model.layers:
                attention = layer.self_attn
                heads = attention.k_proj.out_features // attention.head_dim
                shape = (pages * PAGE, heads, attention.head_dim)
                where = {"dtype": model.dtype, "device": model.device}
                # Zeros, because masking does not remove NaNs.
                self.layers.append((torch.zeros(shape, **where), torch.zeros(shape, **where)))
        self._free = list(range(pages - 1, 0, -1))

    @property
    def free_pages(self) -> int:
        """The number of pages that no request has."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)

    def take(self, tokens: int) -> list[int] | None:
        """Return pages for `tokens` tokens; `None` if too few are free."""
        count = pages_of(tokens)
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        self._free.extend(reversed(pages))


def rows_of(pages: Sequence[int], device: torch.device) -> Tensor:
    """Return the row of each token of a request in a pool, (tokens,)."""
    first = torch.tensor(pages, device=device) * PAGE
    return (first[:, None] + torch.arange(PAGE, device=device)).flatten()


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a prefill, written into pages."""

    is_croppable = False

    def __init__(self, states: States, rows: Tensor) -> None:
        super().__init__()
        self.keys, self.values = states
        self._rows = rows
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the pages exist."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (1, kv_heads, q, head_dim) keys and values, and return those of the whole prompt so far.

        After the first chunk they are gathered from the pages.
        """
        before, self.length = self.length, self.length + key_states.shape[2]
        rows = self._rows[before : self.length]
        self.keys.index_copy_(0, rows, key_states[0].transpose(0, 1))
        self.values.index_copy_(0, rows, value_states[0].transpose(0, 1))
        if not before:
            return key_states, value_states
        every = self._rows[: self.length]
        keys, values = (states.index_select(0, every).transpose(0, 1)[None] for states in (self.keys, self.values))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` more queries will see, and the first key's position."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """Return the number of tokens that can be held."""
        return len(self._rows)


class PagedCache(Cache):  # type: ignore[misc]
    """The cache of a prefill, for the forward pass of a `transformers` model.

    Args:
        rows: The rows of a request's tokens in the pool, or those of several whole prompts one after the other.
    """

    def __init__(self, pool: PagePool, rows: Tensor) -> None:
        super().__init__(layers=[PagedLayer(states, rows) for states in pool.layers])
