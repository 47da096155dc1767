"""Prefill in chunks after a filled cache.

transformers 5.17 splits the whole prompt into chunks, also if the cache holds its first tokens, and so feeds those a
second time. Here the tokens after the cache are fed in chunks, and `generate` feeds the last one.

Source: transformers 5.17.0, generation/utils.py, `GenerationMixin._prefill`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_KNOB = "prefill_chunk_size"


@contextmanager
def continued_prefill(
    model: Any, inputs: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Feed all chunks but the last, and give the arguments of `model.generate` for the rest.

    The arguments are unchanged if the cache is new or empty, or if there is no chunk size.

    Args:
        inputs: `input_ids` and `attention_mask` of the prompt with the tokens in the cache, (batch, tokens).
        arguments: The arguments of `generate`; their chunk size is used before that of a `generation_config`.
    """
    cache = arguments.get("past_key_values")
    held = 0 if cache is None else int(cache.get_seq_length())
    chunk = _chunk_size(model, arguments)
    if not held or chunk is None:
        yield dict(arguments)
        return
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = None if bool(mask.all()) else (mask.cumsum(-1) - 1).clamp(min=0)
    for start in range(held, ids.shape[1] - chunk, chunk):
        end = start + chunk
        places = {} if positions is None else {"position_ids": positions[:, start:end]}
        model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **places,
        )
    # transformers reads None in a call as the value of the model's own generation_config.
    own = model.generation_config
    kept, own.prefill_chunk_size = own.prefill_chunk_size, None
    try:
        yield {**arguments, _KNOB: None}
    finally:
        own.prefill_chunk_size = kept


def _chunk_size(model: Any, arguments: Mapping[str, Any]) -> int | None:
    """Return the chunk size of the arguments, of a `generation_config` among them, or of the model's own."""
    passed = arguments.get("generation_config")
    for value in (arguments.get(_KNOB), getattr(passed, _KNOB, None), model.generation_config.prefill_chunk_size):
        if value is not None:
            return int(value)
    return None
