"""Changes that an adapter makes to token embeddings and head, tied or not."""

from __future__ import annotations

from typing import NamedTuple

from qwen_vram.checkpoints.adapters.keys import Adapter, AdapterTensor, ModuleTensors

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
TABLES = (EMBEDDING, HEAD)


class TableParts(NamedTuple):
    """The tensors of an adapter for one of the two tables.

    Attributes:
        replacement: Replaces the table: trained whole, or saved because the vocabulary was resized.
        tokens: Trained rows.
        indices: The numbers of these rows; `None` if the settings name no rows.
    """

    replacement: AdapterTensor | None
    tokens: AdapterTensor | None
    indices: tuple[int, ...] | None


def table_parts(adapter: Adapter, module: str, *, tied: bool) -> TableParts:
    """Return the tensors of `adapter` for `module`, the embeddings or the head of a base.

    PEFT saves some tensors that tied tables share once, and others twice.
    """
    own = adapter.modules.get(module, ModuleTensors())
    twin_name = HEAD if module == EMBEDDING else EMBEDDING
    twin = adapter.modules.get(twin_name, ModuleTensors())
    settings = adapter.settings
    replacement = own.weight or own.copied_weight
    tokens, indices = own.tokens, settings.tokens_of(module)
    if tied:
        # A table that was trained whole differs from the other one, unless PEFT was told to keep them tied.
        together = settings.ensure_weight_tying or not (settings.saves(module) or settings.saves(twin_name))
        if replacement is None and together:
            replacement = twin.weight or twin.copied_weight
        if module == HEAD:
            shared = settings.tokens_of(EMBEDDING)
            indices = shared if indices is None else indices
            if tokens is None and indices == shared:
                tokens = twin.tokens
    return TableParts(replacement, tokens, indices)
