"""The tensors of the merged checkpoint: their source, updates, ties and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qwen_vram.checkpoints.adapters.tables import EMBEDDING, HEAD
from qwen_vram.lora.delta import LowRank, TokenRows, Update
from qwen_vram.lora.tensor_file import StoredTensor, same_bytes
from qwen_vram.lora.updates import BaseTensors, updates_of
from qwen_vram.lora.weighted import WeightedAdapter
from qwen_vram.spec.architecture import Architecture

_EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
_HEAD_WEIGHT = f"{HEAD}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One tensor of the merged checkpoint, without its storage format.

    Attributes:
        base: The base's tensor.
        updates: Updates by the adapters, in their order; empty if the tensor does not change.
    """

    name: str
    base: StoredTensor
    updates: tuple[Update, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after merging: the base's, or that of an embedding matrix with another number of rows."""
        return self.updates[0].source(self.base).shape if self.updates else self.base.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """All tensors of the merged checkpoint, in the base's order, and their settings in config.json."""

    targets: tuple[Target, ...]
    tie_word_embeddings: bool
    vocab_size: int
    untied: bool


def merge_targets(
    architecture: Architecture, source: str, stored: Mapping[str, StoredTensor], adapters: Sequence[WeightedAdapter]
) -> Targets:
    """Return the tensors of the merged checkpoint.

    Raises:
        AdapterError: an adapter does not fit the base, or two of them replace the same tensor.
    """
    tensors = dict(stored)
    tied = architecture.tie_word_embeddings and _is_tied(tensors)
    if tied:
        tensors[_HEAD_WEIGHT] = tensors[_EMBEDDING_WEIGHT]
    base = BaseTensors(source=source, tensors=tensors, tied=tied)
    found = [updates_of(adapter, number, base) for number, adapter in enumerate(adapters)]
    targets = {}
    for name, tensor in tensors.items():
        updates = tuple(updates[name] for updates in found if name in updates)
        _check_conflicts(name, tensor, updates, adapters)
        targets[name] = Target(name=name, base=tensor, updates=updates)
    embedding, head = targets[_EMBEDDING_WEIGHT], targets[_HEAD_WEIGHT]
    if embedding.shape != head.shape:
        resizing = (*embedding.updates, *head.updates)[0]
        raise adapters[resizing.adapter].adapter.error(
            f"makes {embedding.shape[0]} rows of {embedding.name} and {head.shape[0]} of {head.name}; save it again "
            "with save_pretrained(..., save_embedding_layers=True), which keeps both tables of a resized vocabulary"
        )
    stays_tied = tied and _same_change(embedding.updates, head.updates)
    if stays_tied:
        del targets[_HEAD_WEIGHT]
    return Targets(
        targets=tuple(targets.values()),
        tie_word_embeddings=stays_tied,
        vocab_size=embedding.shape[0],
        untied=tied and not stays_tied,
    )


def _is_tied(tensors: Mapping[str, StoredTensor]) -> bool:
    """Tell if head and embeddings are one tensor; transformers unties a checkpoint that holds two different ones."""
    head = tensors.get(_HEAD_WEIGHT)
    return head is None or same_bytes(head, tensors[_EMBEDDING_WEIGHT])


def _check_conflicts(
    name: str, base: StoredTensor, updates: Sequence[Update], adapters: Sequence[WeightedAdapter]
) -> None:
    """Refuse adapters that cannot be added: one replaces a tensor that another one changes too."""
    for update in updates if len(updates) > 1 else ():
        others = [other for other in updates if other is not update]
        rows = set(update.tokens.indices) if update.tokens else set()
        clash = update.replacement is not None or any(
            other.low_rank or (other.tokens and rows & set(other.tokens.indices)) for other in others if rows
        )
        if clash:
            raise adapters[update.adapter].adapter.error(
                f"replaces {'rows of ' if rows else ''}{name}, which {str(adapters[others[0].adapter].folder)!r} "
                "changes too, so their sum is not defined; merge one of them, then the other one onto the result"
            )
    for update in updates:
        if update.replacement is not None and update.weight != 1.0 and update.replacement.shape != base.shape:
            raise adapters[update.adapter].adapter.error(
                f"resizes {name} and has weight {update.weight:g}, but new rows can only be taken as they are; give it "
                "weight 1"
            )


def _same_change(embedding: Sequence[Update], head: Sequence[Update]) -> bool:
    """Tell if the adapters change both sides of tied embeddings equally."""
    if [update.adapter for update in embedding] != [update.adapter for update in head]:
        return False
    return all(
        _same_tensor(one.replacement, other.replacement)
        and _same_product(one.low_rank, other.low_rank)
        and _same_tokens(one.tokens, other.tokens)
        for one, other in zip(embedding, head, strict=True)
    )


def _same_tensor(one: StoredTensor | None, other: StoredTensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return same_bytes(one, other)


def _same_tokens(one: TokenRows | None, other: TokenRows | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.indices == other.indices and same_bytes(one.values, other.values)


def _same_product(embedding: LowRank | None, head: LowRank | None) -> bool:
    """Tell if the head's factors are the embedding's transposed, as PEFT's ensure_weight_tying makes them."""
    if embedding is None or head is None:
        return embedding is head
    if embedding.magnitude is not None or head.magnitude is not None or embedding.scale != head.scale:
        return False
    return torch.equal(embedding.a.read().T, head.b.read()) and torch.equal(embedding.b.read().T, head.a.read())
