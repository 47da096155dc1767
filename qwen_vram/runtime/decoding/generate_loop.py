"""The generation loop of `transformers` over captured decode steps.

Logits processors, warpers, stopping criteria and streamers are those of `transformers`, called in the same order with
the same arguments. The decision to stop is read one step late, while the next step already runs. The host therefore
never waits for the newest token. The extra step is undone.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from qwen_vram.runtime.decoding.graph_cache import GraphCache
from qwen_vram.runtime.decoding.token_sampler import DeferredStop, TokenSampler

_LOGGER = logging.getLogger(__name__)


class CompiledDecoding:
    """Mixin before a model's class: its `generate` runs captured steps over a `GraphCache`, greedy or sampling."""

    def _sample(self: Any, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if not isinstance(cache, GraphCache):
            return super()._sample(input_ids, *args, **options)  # type: ignore[misc]
        obstacle = _obstacle(cache, **options)
        if obstacle:
            _say_once(f"{obstacle}: this generation runs without compiled decode steps")
            return super()._sample(input_ids, *args, **options)  # type: ignore[misc]
        return _decode(self, input_ids, *args, **options)

    def _beam_search(self: Any, *args: Any, **options: Any) -> Any:
        if isinstance(options.get("past_key_values"), GraphCache):
            _say_once("beam search: this generation runs without compiled decode steps")
        return super()._beam_search(*args, **options)  # type: ignore[misc]

    def _assisted_decoding(self: Any, *args: Any, **options: Any) -> Any:
        if isinstance(options.get("past_key_values"), GraphCache):
            _say_once("assisted decoding: this generation runs without compiled decode steps")
        return super()._assisted_decoding(*args, **options)  # type: ignore[misc]


def decode_by_steps(model: Any) -> None:
    """Let `model.generate` run captured steps if its cache is a `GraphCache`."""
    if isinstance(model, CompiledDecoding):
        return
    kind = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    model.__class__ = type(kind.__name__, (CompiledDecoding, kind), names)


def _obstacle(
    cache: GraphCache, *, generation_config: Any, attention_mask: Tensor | None = None, **options: Any
) -> str:
    """Return why steps cannot run; empty if they can."""
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "output_attentions or output_hidden_states"
    if options.get("synced_gpus") or not options.get("use_cache", True):
        return "synced_gpus=True or use_cache=False"
    if not cache.in_buffers():
        return "a cache of more sequences than it was made for"
    if attention_mask is not None and bool((attention_mask.diff(dim=1) < 0).any()):
        return "padding that is not at the front"
    return ""


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    _LOGGER.warning(text)


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Return the result of `_sample` by decode steps: prefill, then a step for every token."""
    cache: GraphCache = model_kwargs["past_key_values"]
    outputs = model._prefill(
        input_ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
    )
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    del outputs  # in a plain forward pass, logits of the whole prompt
    fed = cache.get_seq_length()
    step = cache.step()
    padding, positions = _places(fed, input_ids.shape[0], input_ids.device, **model_kwargs)
    step.begin(fed, padding, positions, cache.quantized)

    picks = TokenSampler(
        logits_processor, stopping_criteria, generation_config, input_ids, left=cache.lease.max_length - fed
    )
    stop = DeferredStop(input_ids.shape[0], input_ids.device, streamer)
    while True:
        tokens = picks.next(logits)
        stopped = stop.put(picks.unfinished, tokens)
        if stopped or picks.full:
            break
        cache.set_length(cache.layers[0].end_after(tokens[:, None, None]))
        logits = step(tokens, cache.quantized)
    if stopped:
        picks.undo()
        cache.set_length(cache.get_seq_length() - 1)
    else:
        stop.finish()
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return picks.sequences
    return GenerateDecoderOnlyOutput(
        sequences=picks.sequences, scores=picks.scores, logits=picks.logits, past_key_values=cache
    )


def _places(
    length: int,
    batch_size: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Return the padding at the front of each sequence, (batch,), and the next token's position, (batch, 1)."""
    padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if attention_mask is not None:
        padding = (attention_mask[:, :length] == 0).sum(1)
    following = length - padding[:, None] if position_ids is None else position_ids[:, -1:] + 1
    return padding, following.expand(batch_size, 1)
