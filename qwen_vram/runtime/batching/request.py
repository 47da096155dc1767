"""One request of a batch: its settings in `transformers`' terms, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic, time
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from qwen_vram.errors import GenerationStoppedError, NotSupportedError, QwenVramError
from qwen_vram.runtime.batching.choice import Choice
from qwen_vram.runtime.generation.watched import REFUSED, refusal
from qwen_vram.runtime.kv_cache.paged import PagedCache
from qwen_vram.runtime.scheduling.turns import OVERDUE

# Generation modes of `transformers` that a batch of requests runs.
_MODES = ("greedy_search", "sample")
# Options of `generate` that name a cache or its use. The pages are the cache.
_OF_CACHES = ("past_key_values", "cache_implementation", "prefill_chunk_size")


class Request:
    """One sequence that is generated: its prompt, its settings, and its new tokens.

    Args:
        ids: Tokens of the prompt.
        options: Checked options of `generate`.
        deadline: The value of `time.monotonic()` from which it is stopped.
        place: As for `Choice`.

    Attributes:
        stopped: The reason why the request must end, as the words after "the generation"; empty if it may continue.
        error: The error that ended it.
        done: It ended.
        fed: Tokens of the prompt that are in the pages.
        pages: Its pages; `None` while it waits.
        rows: The row of each of its tokens in the pages, for its prefill.
        cache: The cache of its prefill, if it is fed in chunks.

    Raises:
        NotSupportedError: an option that a batch of requests does not run.
        WorkloadError: `transformers` refuses the options.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: Sequence[int],
        max_new_tokens: int,
        options: Mapping[str, Any],
        *,
        deadline: float | None = None,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self.prompt_len, self.max_new_tokens = len(ids), max_new_tokens
        self.deadline = deadline
        passed = dict(options)
        seed, self._streamer = passed.pop("seed", None), passed.pop("streamer", None)
        processors, criteria = passed.pop("logits_processor", None), passed.pop("stopping_criteria", None)
        passed.pop("num_return_sequences", None)
        for name in _OF_CACHES:
            if passed.pop(name, None) is not None:
                raise NotSupportedError(
                    f"{name} is not supported with cache='paged', whose pages are the only cache; load without "
                    "concurrency to use it",
                    knob=name,
                    value=options[name],
                )
        self._tokens = torch.empty(len(ids) + max_new_tokens, dtype=torch.long)
        self._tokens[: len(ids)] = torch.tensor(ids)
        self.count = len(ids)
        self._options, self._processors = passed, LogitsProcessorList(processors or ())
        self._seed, self._place = seed, place
        own = StoppingCriteriaList(criteria or ())
        try:
            # On the host, because a request that waits has no memory of the device.
            self.choice, config = self._choice_on(torch.device("cpu"), model)
            every = model._get_stopping_criteria(generation_config=config, stopping_criteria=own, tokenizer=tokenizer)
        except QwenVramError:
            raise
        except REFUSED as error:
            raise refusal(error, options) from error
        eos = config._eos_token_tensor
        self._ends = frozenset([] if eos is None else eos.tolist())
        counted = (MaxLengthCriteria, EosTokenCriteria)  # by `take` itself
        self._criteria = [one for one in every if not isinstance(one, counted) or one in own]
        self.stopped = ""
        self.error: BaseException | None = None
        self.done = False
        self.fed = 0
        self.pages: list[int] | None = None
        self.rows: Tensor | None = None
        self.cache: PagedCache | None = None

    @property
    def tokens(self) -> Tensor:
        """All tokens so far on the host, (tokens,)."""
        return self._tokens[: self.count]

    @property
    def newest(self) -> int:
        """The newest token."""
        return int(self._tokens[self.count - 1])

    @property
    def new_tokens(self) -> int:
        """The number of new tokens so far."""
        return self.count - self.prompt_len

    def begin(self, model: Any) -> None:
        """Make the choice on the device, give the prompt to the streamer, and start the time of `max_time`."""
        if model.device.type != "cpu":
            self.choice, _ = self._choice_on(model.device, model)
        for one in self._criteria:
            if isinstance(one, MaxTimeCriteria):
                one.initial_timestamp = time()
        if self._streamer is not None:
            self._streamer.put(self.tokens[None])

    def _choice_on(self, device: torch.device, model: Any) -> tuple[Choice, Any]:
        """Return the choice, with its tensors on a device, and the settings that `generate` would use."""
        config = _config(model, dict(self._options), self.prompt_len, self.max_new_tokens, device)
        made = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=self.prompt_len,
            encoder_input_ids=self._tokens[None, : self.prompt_len].to(device),
            logits_processor=self._processors,
            device=device,
            model_kwargs={},
        )
        return Choice(made, sample=bool(config.do_sample), seed=self._seed, place=self._place), config

    def take(self, token: int) -> bool:
        """Take the next token, and tell if it is the last one."""
        self._tokens[self.count] = token
        self.count += 1
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        ended = token in self._ends or self.new_tokens >= self.max_new_tokens
        for one in self._criteria:
            ended = bool(torch.as_tensor(one(self.tokens[None], None)).all()) or ended
        return ended

    def end(self, error: BaseException | None = None) -> None:
        """Note the end, and tell the streamer."""
        self.error = self.error or error
        if self._streamer is not None and not self.done and self.error is None:
            try:
                self._streamer.end()
            except Exception as own:  # the caller's code
                self.error = own
        self.done = True
        self.rows = self.cache = None

    def must_end(self) -> GenerationStoppedError | None:
        """Return the error of a request that was stopped or whose deadline is over; otherwise `None`."""
        if not self.stopped and self.deadline is not None and monotonic() > self.deadline:
            self.stopped = OVERDUE
        if not self.stopped:
            return None
        made = self.new_tokens
        return GenerationStoppedError(f"the generation {self.stopped} after {made:,} new tokens", tokens=made)


def _config(model: Any, options: dict[str, Any], prompt_len: int, max_new_tokens: int, device: torch.device) -> Any:
    """Return the settings that `generate` would use, with special tokens on a device."""
    given = options.pop("generation_config", None)
    config, rest = model._prepare_generation_config(given, **options, max_new_tokens=max_new_tokens)
    config.max_length = prompt_len + max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = prompt_len + config.min_new_tokens
    if config.token_healing:
        rest["token_healing"] = True
    rest = {name: value for name, value in rest.items() if value is not None and name not in _KNOWN}
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    if rest or mode not in _MODES:
        what = f"the option {next(iter(rest))!r}" if rest else f"the generation mode {mode!r}"
        raise NotSupportedError(
            f"{what} is not supported with cache='paged', which runs greedy_search and sample; load without "
            "concurrency to use it",
            knob=next(iter(rest)) if rest else "num_beams",
            value=next(iter(rest.values())) if rest else mode,
        )
    model._prepare_special_tokens(config, True, device=device, batch_size=1)
    return config


# Arguments of `generate` that change no token here.
_KNOWN = ("use_cache", "return_dict_in_generate", "disable_compile", "tokenizer", "attention_mask")
