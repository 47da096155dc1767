"""Preparation of a request: its answers as streams that are checked and have not started."""

from __future__ import annotations

from functools import partial
from typing import Any

import qwen_vram as qv
from qwen_vram.serving.engine.answer import Answer
from qwen_vram.serving.engine.answer_text import AnswerText
from qwen_vram.serving.engine.interface import Prepared
from qwen_vram.serving.engine.token_bytes import TokenBytes
from qwen_vram.serving.engine.tool_calls import ToolCalls
from qwen_vram.serving.wire.requests import Wanted


def prepared_on(llm: qv.LoadedModel, tokens: TokenBytes, wanted: Wanted) -> Prepared:
    """Return the answers of a request.

    Args:
        tokens: The reader of the model's tokens.

    Raises:
        QwenVramError: the request cannot run.
    """
    names = frozenset(tool["function"]["name"] for tool in wanted.tools)
    decode = partial(llm.tokenizer.decode, skip_special_tokens=True)
    options: dict[str, Any] = {**wanted.sampling, "max_new_tokens": wanted.max_tokens, "logprobs": wanted.logprobs}
    if wanted.chat:
        options |= {"chat_template_kwargs": wanted.template} if wanted.template else {}
        options |= {"tools": wanted.tools} if wanted.tools else {}
    answers, prompt_tokens = [], 0
    for place, prompt in enumerate(wanted.prompts or ("",)):
        asked: dict[str, Any] = {"message": wanted.messages} if wanted.chat else {"prompt": prompt}
        for number in range(wanted.answers):
            answer = Answer(
                place * wanted.answers + number,
                AnswerText(decode, wanted.stops),
                ToolCalls(names) if names else None,
                None if wanted.logprobs is None else tokens,
            )
            seed: dict[str, Any] = {} if wanted.seed is None else {"seed": (wanted.seed + answer.index) % 2**64}
            answer.stream = llm.tokens(**asked, **options, **seed, until=answer.take)
            answers.append(answer)
        prompt_tokens += answers[-1].stream.prompt_tokens
    return Prepared(tuple(answers), prompt_tokens)
