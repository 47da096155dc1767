"""Fields of requests that are refused by name, because they would change the answer."""

from __future__ import annotations

from typing import Any

from qwen_vram.serving.wire.fields import Fields
from qwen_vram.serving.wire.problem import shown, unsupported

_NO_GRAMMAR = "no library for constrained decoding is connected"
# Fields that would change the answer, with their values that do not, and the reason of the refusal.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "presence_penalty": ((0,), "use repetition_penalty"),
    "logit_bias": (({},), "the plan does not count its memory"),
    "response_format": (({"type": "text"},), f"{_NO_GRAMMAR}; use type text"),
    "modalities": ((["text"],), "this model writes text alone"),
    "audio": ((), "this model writes text alone"),
    "prediction": ((), "there is no speculative decoding"),
    "functions": (([],), "it is deprecated; use tools"),
    "function_call": (("none", "auto"), "it is deprecated; use tools"),
    "web_search_options": ((), "this server asks no other one"),
    "reasoning_effort": ((), 'use chat_template_kwargs={"enable_thinking": ...} if the template has it'),
    "verbosity": (("medium",), "say it in a message"),
    "parallel_tool_calls": ((True,), "the number of calls is not constrained; use true"),
    "best_of": ((1,), "use n"),
    "echo": ((False,), "join the prompt and the answer"),
    "suffix": (("",), "this model continues a text, and does not fill a gap"),
    "min_tokens": ((0,), "an answer ends where the model ends it"),
    "ignore_eos": ((False,), "an answer ends where the model ends it"),
    "length_penalty": ((1,), "there is no beam search"),
    "use_beam_search": ((False,), "there is no beam search"),
    "prompt_logprobs": ((), "tokens of the prompt have no log probabilities here"),
    "chat_template": ((), "a request brings no program; choose the template when the server starts"),
    "documents": (([],), "send them as messages"),
    "add_generation_prompt": ((True,), "the server always asks for an answer"),
    "continue_final_message": ((False,), "use /v1/completions with a prompt of your own"),
    "guided_json": ((), _NO_GRAMMAR),
    "guided_regex": ((), _NO_GRAMMAR),
    "guided_choice": ((), _NO_GRAMMAR),
    "guided_grammar": ((), _NO_GRAMMAR),
    "structured_outputs": ((), _NO_GRAMMAR),
    "stop_token_ids": (([],), "use stop with texts"),
    "bad_words": (([],), "no token is excluded here"),
    "allowed_token_ids": (([],), "no token is excluded here"),
    "include_stop_str_in_output": ((False,), "an answer ends before its stop text"),
    "skip_special_tokens": ((True,), "special tokens are never in the text"),
    "truncate_prompt_tokens": ((), "a prompt is never shortened; one that does not fit is refused"),
}  # fmt: skip


def refuse_unsupported(fields: Fields) -> None:
    """Refuse fields that would change the answer and are not supported.

    Raises:
        ApiError: there is such a field, with a value that has an effect.
    """
    for name, (harmless, why) in REFUSED.items():
        value = fields.any(name)
        if value is not None and not any(_same(value, one) for one in harmless):
            raise unsupported(name, f"{why}; got {shown(value)}")


def _same(value: Any, one: Any) -> bool:
    """Compare JSON values, in which true is not 1."""
    return bool(value == one) and isinstance(value, bool) == isinstance(one, bool)
