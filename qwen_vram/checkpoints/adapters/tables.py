"""Embedding and head: what an adapter makes of the two tables of tokens, which tied embeddings share."""

from __future__ import annotations

from typing import NamedTuple

from qwen_vram.checkpoints.adapters.keys import Adapter, AdapterTensor, ModuleTensors

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
TABLES = (EMBEDDING, HEAD)


class TableParts(NamedTuple):
    """The tensors of an adapter for one side.

    Attributes:
        replacement: Takes the table's place: trained whole, or saved because the vocabulary was resized.
        tokens: Trained rows.
        indices: Where they belong; `None` where the settings name none.
    """

    replacement: AdapterTensor | None
    tokens: AdapterTensor | None
    indices: tuple[int, ...] | None


def table_parts(adapter: Adapter, module: str, *, tied: bool) -> TableParts:
    """Return what `adapter` holds for `module`, the embedding or the head of a base whose two sides are tied or not.

    PEFT saves some of what it shares between tied sides once, and some of it twice.
    """
    own = adapter.modules.get(module, ModuleTensors())
    twin_name = HEAD if module == EMBEDDING else EMBEDDING
    twin = adapter.modules.get(twin_name, ModuleTensors())
    settings = adapter.settings
    replacement = own.weight or own.copied_weight
    tokens, indices = own.tokens, settings.tokens_of(module)
    if tied:
        # A side that was trained whole has left the other behind, unless PEFT was told to keep them together.
        together = settings.ensure_weight_tying or not (settings.saves(module) or settings.saves(twin_name))
        if replacement is None and together:
            replacement = twin.weight or twin.copied_weight
        if module == HEAD:
            shared = settings.tokens_of(EMBEDDING)
            indices = shared if indices is None else indices
            if tokens is None and indices == shared:
                tokens = twin.tokens
    return TableParts(replacement, tokens, indices)
