"""Updates with readable tensors, from the changes that an adapter's headers show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vram.checkpoints.adapters.changes import Base, Change, Factors, changes_of, check_layers
from qwen_vram.checkpoints.adapters.tables import TABLES
from qwen_vram.lora.delta import LowRank, TokenRows, Update
from qwen_vram.lora.tensor_file import StoredTensor, same_bytes, same_values
from qwen_vram.lora.weighted import WeightedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensors:
    """The base's tensors by name. A tied head is listed under its own name too, as the embedding's tensor."""

    source: str
    tensors: Mapping[str, StoredTensor]
    tied: bool

    @property
    def shapes(self) -> Base:
        """The shapes of the tensors, without the files."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return Base(source=self.source, shapes=shapes, tied=self.tied)


def updates_of(one: WeightedAdapter, number: int, base: BaseTensors) -> dict[str, Update]:
    """Return the updates of the adapter with this `number`, by the name of the base's tensor.

    Raises:
        AdapterError: it belongs to another base, lacks a tensor, or holds one that the base has no module for.
    """
    check_layers(one.adapter, base.shapes)
    updates = {}
    for name, change in changes_of(one.adapter, base.shapes).items():
        if name not in base.tensors:
            raise one.adapter.error(
                f"does not fit the base {base.source!r}: {name.removesuffix('.bias')} has no bias that its lora_bias "
                "could be added to; run it beside its base: qv.load(base, adapter=...)"
            )
        update = _update(one, number, name, change, base.tensors[name])
        if update is not None:
            updates[name] = update
    return updates


def _update(one: WeightedAdapter, number: int, name: str, change: Change, base: StoredTensor) -> Update | None:
    """Return a change as an update; `None` if it is a copy of the base, which PEFT saves for adapted embeddings."""
    replacement = None if change.replacement is None else one.stored(change.replacement)
    if change.second_copy is not None and change.replacement is not None:
        twice = one.stored(change.second_copy)
        if replacement is None or not same_bytes(twice, replacement):
            raise one.adapter.error(
                f"is not what its adapter_config.json says: {twice.name} is not the same as {name}; save it "
                "again with PEFT's save_pretrained()"
            )
    if replacement is not None and name.removesuffix(".weight") in TABLES and same_values(replacement, base):
        replacement = None
    if not (replacement or change.factors or change.shift or change.tokens):
        return None
    return Update(
        adapter=number,
        weight=one.weight,
        replacement=replacement,
        low_rank=_low_rank(one, change.factors),
        shift=None if change.shift is None else (one.stored(change.shift[0]), change.shift[1]),
        tokens=None
        if change.tokens is None
        else TokenRows(values=one.stored(change.tokens[0]), indices=change.tokens[1]),
    )


def _low_rank(one: WeightedAdapter, factors: Factors | None) -> LowRank | None:
    if factors is None:
        return None
    return LowRank(
        a=one.stored(factors.a),
        b=one.stored(factors.b),
        scale=factors.scale,
        magnitude=None if factors.magnitude is None else one.stored(factors.magnitude),
        embedding=factors.embedding,
    )
