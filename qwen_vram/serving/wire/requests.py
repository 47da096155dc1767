"""Requests of the chat and completion endpoints, as checked data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen_vram.serving.wire.fields import Fields
from qwen_vram.serving.wire.messages import read_messages, read_tools
from qwen_vram.serving.wire.problem import shown, unsupported, wrong
from qwen_vram.serving.wire.unsupported import refuse_unsupported

# The most answers of one request, over all of its prompts.
MAX_ANSWERS = 16
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000
_MAX_TOKENS = 10**9
# Source: https://platform.openai.com/docs/api-reference/completions/create, `max_tokens`.
_COMPLETION_TOKENS = 16
# Arguments of a chat template that a request may not set: they are programs, or other parts of the request.
_NOT_TEMPLATE = ("chat_template", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A checked request.

    Attributes:
        model: The name of the asked model; `None` is the served one.
        messages: The conversation; empty for a completion.
        prompts: The prompts of a completion; empty for a chat.
        answers: Answers to each prompt.
        max_tokens: The most tokens of each answer; `None` is the planned number.
        stops: Texts before which an answer ends.
        sampling: Options of sampling that the request names.
        seed: The seed of the first answer; later ones get the next numbers.
        logprobs: The number of alternatives of each token; `None` is no log probabilities.
        tools: Functions that the model may call.
        template: Arguments of the chat template.
    """

    model: str | None
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompts: tuple[str, ...] = ()
    answers: int = 1
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        """True for a chat, false for a completion."""
        return not self.prompts


def chat_request(body: dict[str, Any]) -> Wanted:
    """Return the request of `/v1/chat/completions`.

    Raises:
        ApiError: a field is wrong, or not supported.
    """
    fields = Fields(body)
    refuse_unsupported(fields)
    tools = read_tools(body.get("tools"))
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise unsupported("tool_choice", f'"auto" and "none" are, and a call is not forced; got {shown(choice)}')
    limit = fields.whole("max_completion_tokens", 1, _MAX_TOKENS) or fields.whole("max_tokens", 1, _MAX_TOKENS)
    top = fields.whole("top_logprobs", 0, 20)
    asked = fields.flag("logprobs")
    if top is not None and not asked:
        raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
    return Wanted(
        messages=read_messages(body.get("messages")),
        max_tokens=limit,
        logprobs=(top or 0) if asked else None,
        tools=[] if choice == "none" else tools,
        template=_template(fields),
        **_common(fields, prompts=1),
    )


def completion_request(body: dict[str, Any]) -> Wanted:
    """Return the request of `/v1/completions`.

    Raises:
        ApiError: a field is wrong, or not supported.
    """
    fields = Fields(body)
    refuse_unsupported(fields)
    given = body.get("prompt")
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) and one for one in prompts):
        raise wrong(f"prompt must be a text or a list of texts, none empty, got {shown(given)}", "prompt")
    return Wanted(
        prompts=tuple(prompts),
        max_tokens=fields.whole("max_tokens", 1, _MAX_TOKENS) or _COMPLETION_TOKENS,
        logprobs=fields.whole("logprobs", 0, 5),
        **_common(fields, prompts=len(prompts)),
    )


def _common(fields: Fields, *, prompts: int) -> dict[str, Any]:
    """Return the fields that both endpoints have."""
    answers = fields.whole("n", 1, MAX_ANSWERS) or 1
    if answers * prompts > MAX_ANSWERS:
        raise wrong(
            f"n={answers} answers to {prompts} prompts are {answers * prompts}; at most {MAX_ANSWERS} answers are in "
            "one request: send several requests",
            "n" if answers > 1 else "prompt",
        )
    stream = fields.flag("stream") or False
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise wrong("stream_options needs stream: true", "stream_options")
    seed = fields.whole("seed", -(2**63), _SEED_MASK)
    sampling = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "top_k": fields.whole("top_k", -1, 10**6),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 10),
    }
    if sampling["top_k"] == -1:
        sampling["top_k"] = 0  # off, as in vLLM
    return {
        "model": fields.text("model"),
        "answers": answers,
        "stream": stream,
        "include_usage": Fields(options or {}, "stream_options.").flag("include_usage") or False,
        "stops": _stops(fields.any("stop")),
        "sampling": {name: value for name, value in sampling.items() if value is not None},
        "seed": None if seed is None else seed & _SEED_MASK,
    }


def _stops(given: Any) -> tuple[str, ...]:
    texts = [] if given is None else [given] if isinstance(given, str) else given
    good = isinstance(texts, list) and len(texts) <= _MAX_STOPS
    if not good or not all(isinstance(one, str) and 0 < len(one) <= _MAX_STOP_LENGTH for one in texts):
        raise wrong(
            f"stop must be a text or a list of at most {_MAX_STOPS} texts, each of 1 to {_MAX_STOP_LENGTH:,} "
            f"characters, got {shown(given)}",
            "stop",
        )
    return tuple(texts)


def _template(fields: Fields) -> dict[str, Any]:
    given = fields.object("chat_template_kwargs") or {}
    for name, value in given.items():
        if (
            not name.isidentifier()
            or name in _NOT_TEMPLATE
            or not isinstance(value, (str, int, float, bool, type(None)))
        ):
            raise wrong(
                f"chat_template_kwargs has {shown(name)}; allowed are names of the template's own variables, with a "
                "text, a number, true or false",
                "chat_template_kwargs",
            )
    return given
