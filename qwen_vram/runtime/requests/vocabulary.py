"""Checks of a tokenizer against the embedding matrix of its model, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from qwen_vram.errors import CheckpointError

# Files of a tokenizer; the first three hold its vocabulary.
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
# A byte-level tokenizer, such as Qwen's, has at least a token for each byte.
_BYTES = 256
_SHOWN = 3


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, table: int, folder: Path, *, used: bool = False) -> None:
    """Refuse a tokenizer that lacks its vocabulary.

    A folder without any tokenizer file is accepted if the tokenizer is not `used`: its model takes token ids.

    Args:
        table: Rows of the model's token embeddings.

    Raises:
        CheckpointError: the tokenizer has tokens for less than half of the embedding rows. It also lacks tokens for
            some bytes, or has ids without a token.
    """
    if 2 * len(tokenizer) >= table:
        return
    known = tokenizer.get_vocab()
    whole = len(known) >= _BYTES and len(known) == max(known.values()) + 1
    there = [name for name in _FILES if (folder / name).is_file()]
    if whole or not (used or there):
        return
    raise CheckpointError(
        f"the tokenizer in {str(folder)!r} knows {len(known):,} tokens, and the model has {table:,}; its words are "
        f"missing ({', '.join(there) or 'no tokenizer file'} found): add the model's tokenizer.json, or its vocab.json "
        "and merges.txt",
        path=str(folder),
    )


def check_tokens(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase, table: int, folder: Path) -> None:
    """Refuse token ids beyond the rows of the embeddings: on a GPU they would end the process.

    Raises:
        CheckpointError: there are such ids, or no tokens.
    """
    if not input_ids.shape[1]:
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} makes no tokens of the prompt; use another prompt, or add the model's "
            "tokenizer.json",
            path=str(folder),
        )
    past = sorted(set(input_ids[input_ids >= table].tolist()))
    if past:
        names = [f"{tokenizer.convert_ids_to_tokens(one)!r} (token {one:,})" for one in past[:_SHOWN]]
        more = f" and {len(past) - _SHOWN} more" if len(past) > _SHOWN else ""
        raise CheckpointError(
            f"the model's token table has {table:,} rows, and the tokenizer in {str(folder)!r} gives "
            f"{', '.join(names)}{more}: tokens were added, and the table was not resized. Call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model, or use the tokenizer that belongs to it",
            path=str(folder),
        )


def padding_token(tokenizer: PreTrainedTokenizerBase, table: int) -> int:
    """Return a token for padding, which attention never sees: the tokenizer's own, its end token, or token 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((one for one in known if isinstance(one, int) and 0 <= one < table), 0)


def padded_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], table: int) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of prompts, (prompts, tokens), with padding at the front."""
    rows: Any = tokenizer(list(prompts))["input_ids"]
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    filler = padding_token(tokenizer, table)
    masks = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=filler, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
    }
