"""Tensors that PEFT keeps in memory for an adapter beside its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qwen_vram.checkpoints.adapters.changes import Base, Change, changes_of
from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.adapters.folder import CONFIG, AdapterPath
from qwen_vram.checkpoints.adapters.keys import Adapter, AdapterTensor, open_adapter
from qwen_vram.checkpoints.adapters.tables import HEAD, TABLES
from qwen_vram.errors import NotSupportedError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import Weight

_HEAD_WEIGHT = f"{HEAD}.weight"


def with_adapter(label: str, architecture: Architecture, adapter: AdapterPath | Adapter) -> Architecture:
    """Return `architecture` with an adapter's tensors beside its own.

    Raises:
        AdapterError: the adapter's files cannot be used, belong to another base, or resize the vocabulary.
        CheckpointError: its file of tensors is cut off or corrupt.
        NotSupportedError: DoRA, whose forward is not counted.
        HubError: the hub does not give the files.
    """
    opened = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    settings = opened.settings
    architecture = _of_layers(label, architecture, opened)
    base = base_of(label, architecture)
    changes = changes_of(opened, base)
    if settings.use_dora:
        raise NotSupportedError(
            "a DoRA adapter cannot run beside its base: its forward is not counted; merge it first with "
            "merge_lora_then_quantize()",
            knob="use_dora",
            value=True,
        )
    _check_rows(opened, base, changes)
    kept = {tensor.name for tensor in _kept(opened, base, changes)}
    weights = [tensor for tensor in opened.tensors.values() if tensor.name in kept]
    return replace(
        architecture,
        adapter_weights=tuple(Weight(tensor.path, tensor.shape, "adapter") for tensor in weights),
        adapter_replaces=tuple(name for name, change in changes.items() if change.replacement is not None),
        adapter_activated=settings.activated,
        adapter_mutates_base=settings.mutates_base,
        adapter_in_blocks=settings.blocks is not None and any(map(settings.blocks.name, opened.modules)),
    )


def _of_layers(label: str, base: Architecture, adapter: Adapter) -> Architecture:
    """Return the architecture with the layers of the adapter's model, each with separate weights.

    PEFT's copies of a layer share its weights. Here each copy is loaded, so that it works with all formats and devices.
    """
    replication, layers = adapter.settings.replication, base.num_hidden_layers
    if replication is None or replication.is_the_base(layers):
        return base
    path = str(adapter.folder / CONFIG)
    said = f"{path!r}: layer_replication is {replication}"
    if not replication.fits(layers):
        raise AdapterError(
            f"{said}, and the base {label!r} has {layers} layers, 0 to {layers - 1}; pass the base that the adapter "
            "was trained on",
            path=path,
        )
    if base.stored_format is not None:
        raise AdapterError(
            f"{said}, and the base {label!r} is stored as {base.stored_format!r}, whose layers are taken as they are; "
            "pass the 16-bit base, and the format as weights=...",
            path=path,
        )
    order = replication.order()
    if adapter.settings.mutates_base and len(set(order)) < len(order):
        raise AdapterError(
            f"{said}, and {adapter.settings.mutates_base} changes weights that PEFT's copies of a layer share; train "
            "it on a base that holds these layers as its own",
            path=path,
        )
    return replace(base, layers=tuple(base.layers[number] for number in order), adapter_layers=order)


def base_of(source: str, architecture: Architecture) -> Base:
    """Return the tensors of an architecture, a tied head under its own name too."""
    weights = (*architecture.weights(), architecture.head)
    return Base(
        source=source,
        shapes={weight.name: weight.shape for weight in weights},
        tied=architecture.tie_word_embeddings,
    )


def _check_rows(adapter: Adapter, base: Base, changes: Mapping[str, Change]) -> None:
    """Refuse a table with another number of rows than the base's, because PEFT does not resize the base."""
    for table in TABLES:
        tensor = changes[name].replacement if (name := f"{table}.weight") in changes else None
        rows = base.shapes[name][0]
        if tensor is not None and tensor.shape[0] != rows:
            raise adapter.error(
                f"holds {tensor.shape[0]:,} rows of {name}, and the base {base.source!r} has {rows:,}: its vocabulary "
                "was resized in training, so it cannot run beside the base; merge it, which resizes the tables: "
                "qv.merge_lora_then_quantize(base, adapter, out), or qwen-vram merge BASE ADAPTER OUT"
            )


def _kept(adapter: Adapter, base: Base, changes: Mapping[str, Change]) -> Iterator[AdapterTensor]:
    """Yield the tensors that take additional memory; the others replace those of the base.

    If the settings tie the two tables, PEFT saves both sides and keeps one.
    Source: peft 0.21.2, measured on models of both kinds.
    """
    one_side = base.tied and adapter.settings.ensure_weight_tying
    for name, change in changes.items():
        if one_side and name == _HEAD_WEIGHT:
            continue
        if change.replacement is not None and change.kept_beside:
            yield change.replacement
        if change.factors is not None:
            yield from (change.factors.a, change.factors.b)
            if change.factors.diagonal is not None:
                yield change.factors.diagonal
        if change.shift is not None:
            yield change.shift[0]
        if change.tokens is not None:
            yield change.tokens[0]
