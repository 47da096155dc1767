"""The one cache that a model keeps between the turns of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from qwen_vram.errors import GenerationStoppedError
from qwen_vram.runtime.decoding.graph_cache import GraphCache
from qwen_vram.runtime.kv_cache.preallocated import cache_bytes
from qwen_vram.runtime.kv_cache.quantized import QuantizedLayer
from qwen_vram.runtime.memory.beside import Beside


class Owner:
    """An owner of the kept cache: one conversation.

    Attributes:
        closed: It needs no cache any more.
    """

    def __init__(self) -> None:
        self.closed = False


class Claim(NamedTuple):
    """The claim of one turn to the kept cache.

    Attributes:
        owner: The conversation.
        ended: Called in the turn with the ids of the new tokens, also if the generation was stopped.
    """

    owner: Owner
    ended: Callable[[list[int]], object]


class KeptCache:
    """The idle cache of the last turn, with the tokens that it holds. It is empty while a turn uses the cache.

    The lock is reentrant, because the garbage collector may drop a conversation on any line.

    Args:
        beside: The count of memory beside the model, which a cache that is freed between generations changes.
    """

    def __init__(self, beside: Beside) -> None:
        self._beside = beside
        self._lock = RLock()
        self._owner: Owner | None = None
        self._cache: Cache | None = None
        self._tokens: list[int] = []
        self._taken: dict[torch.device, int] = {}

    def holds(self, cache: Cache) -> bool:
        """Tell if this cache is kept."""
        return self._cache is cache

    def drop(self, *, unless: Owner | None = None, only: Owner | None = None) -> None:
        """Free the idle cache.

        Args:
            unless: The owner whose cache stays.
            only: The owner whose cache is freed; `None` is any.
        """
        with self._lock:
            if self._cache is None or self._owner is unless or (only is not None and self._owner is not only):
                return
            with self._beside.freeing():
                _release(self._cache)
                self._forget()

    def take(self, owner: Owner, input_ids: Tensor, *, context_len: int) -> Cache | None:
        """Take out the cache of `owner`, with the tokens that it and a prompt, (1, tokens), begin with.

        These are at most all tokens of the prompt but one. The cache is freed, and `None` returned, if it cannot hold
        `context_len` tokens, shares no token with the prompt, or cannot forget the other tokens.
        """
        with self._lock:
            cache = self._cache
            if self._owner is not owner or cache is None:
                return None
            common = _common(self._tokens, input_ids[0, :-1].tolist())
            if common and _capacity(cache) >= context_len and shorten(cache, common):
                self._taken = {device: cache_bytes(cache, device) for device in self._beside.devices}
                self._forget()
                return cache
            del cache
            self.drop()
            return None

    @contextmanager
    def used(
        self, claim: Claim | None, cache: Cache | None, input_ids: Tensor, *, lasting: bool
    ) -> Iterator[Callable[[Tensor], None]]:
        """Give a function that takes the prompt with its answer, (1, tokens); at the end, keep the cache of a turn.

        A turn that was stopped between two chunks of its prompt leaves their tokens in the cache. Any other error
        leaves no cache.

        Args:
            claim: `None` if the generation is no turn of a conversation.
            input_ids: The prompt.
            lasting: The cache may be kept.
        """
        answered: list[Tensor] = []
        kept = False
        try:
            yield answered.append
            if claim is not None:
                tokens = answered[0][0].tolist()
                kept = lasting and self._keep(claim.owner, cache, tokens)
                claim.ended(tokens[input_ids.shape[1] :])
        except GenerationStoppedError:
            kept = lasting and claim is not None and self._keep(claim.owner, cache, input_ids[0].tolist())
            raise
        finally:
            if claim is not None and not kept:
                self.lose(cache)

    def lose(self, cache: Cache | None) -> None:
        """Give up the cache of a turn, whose memory is freed with the turn's other tensors."""
        _release(cache)
        if not isinstance(cache, GraphCache):  # its memory stays with the model
            self._beside.lost(self._taken)
        self._taken = {}

    def _keep(self, owner: Owner, cache: Cache | None, tokens: Sequence[int]) -> bool:
        """Keep a cache that holds the first ones of `tokens`, and tell if it is kept."""
        held = 0 if cache is None else int(cache.get_seq_length())
        with self._lock:
            if owner.closed or not 0 < held <= len(tokens):
                return False
            self._owner, self._cache, self._tokens = owner, cache, list(tokens[:held])
            self._taken = {}
            return True

    def _forget(self) -> None:
        self._cache = self._owner = None
        self._tokens = []


def shorten(cache: Cache, length: int) -> bool:
    """Remove all tokens after the first `length` ones, and tell if the cache can do so; otherwise nothing changes."""
    extra = int(cache.get_seq_length()) - length
    if extra < 0 or any(isinstance(layer, QuantizedLayer) and extra > layer.whole for layer in cache.layers):
        return False
    if isinstance(cache, StaticCache):  # it cannot be cropped, and masks what is beyond its length
        if not all(hasattr(layer, "cumulative_length") for layer in cache.layers):
            return False
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
    elif extra:
        for layer in cache.layers:
            layer.crop(-extra)
    return True


def _capacity(cache: Cache) -> float:
    """Return the number of tokens that a cache can hold."""
    return float("inf") if isinstance(cache, DynamicCache) else int(cache.layers[0].get_max_length())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _release(cache: Cache | None) -> None:
    if isinstance(cache, GraphCache):
        cache.release()
