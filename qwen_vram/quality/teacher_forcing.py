"""Logits of a loaded model for the tokens of a document, through the cache of its plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_vram.errors import NotFiniteError
from qwen_vram.runtime.loaded_model import LoadedModel

# Tokens of one forward pass: attention reads earlier tokens from the cache, as in a generation.
PIECE = 64


@torch.inference_mode()
def scored_logits(llm: LoadedModel, ids: Sequence[int], context: int) -> Tensor:
    """Return the logits that predict each token from `context` on: (tokens, vocab_size) on the host, as computed.

    The first `context` tokens are one forward pass, and the others follow in pieces.

    Raises:
        NotFiniteError: a logit is NaN or infinite.
    """
    cache = llm.new_cache(max_length=len(ids))
    tokens = torch.tensor([ids[:-1]], device=llm.device)
    found = [_forward(llm, tokens[:, :context], cache, keep=1)]
    for start in range(context, len(ids) - 1, PIECE):
        found.append(_forward(llm, tokens[:, start : start + PIECE], cache, keep=0))
    logits = torch.cat(found)
    if not torch.isfinite(logits).all():
        raise NotFiniteError(
            f"the logits of {llm.plan.estimate.model!r} are not finite; load it with another dtype, such as bf16",
            dtype=str(logits.dtype).removeprefix("torch."),
            module="",
        )
    return logits


def _forward(llm: LoadedModel, tokens: Tensor, cache: object, keep: int) -> Tensor:
    made = llm.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits: Tensor = made.logits[0].cpu()
    return logits
