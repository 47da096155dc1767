"""Conversations: messages through the chat template to tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_vram.errors import WorkloadError
from qwen_vram.runtime.requests.template import Template

Message = Mapping[str, Any]

# Parts of a message beside its content. If the template does not read them, the message is refused.
_READ = ("tool_calls", "function_call", "images", "image", "videos", "video", "audio", "documents")


def messages_of(message: str | Sequence[Message], system: str | None, template: Template) -> list[dict[str, Any]]:
    """Return messages with content as one text: parts are joined, and arguments of tool calls become objects.

    Raises:
        WorkloadError: it is not a conversation, or has parts that the template would leave out.
    """
    asked = [{"role": "user", "content": message}] if isinstance(message, str) else message
    if not isinstance(asked, Sequence) or not asked or not all(_is_message(one) for one in asked):
        raise _refused(
            f'message must be a text, or a list of {{"role": ..., "content": ...}}, got {_short(message)}', message
        )
    messages = [_read(number, one, template) for number, one in enumerate(asked)]
    if system is not None:
        if not isinstance(system, str):
            raise WorkloadError(f"system must be a text, got {system!r}", name="system", got=system)
        messages.insert(0, {"role": "system", "content": system})
    return messages


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: Template,
    options: Mapping[str, Any],
    folder: Path,
) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, (1, tokens), of a conversation.

    Args:
        options: Arguments of the template.

    Raises:
        WorkloadError: the template refuses the conversation, or fails on it.
    """
    go_on = options.get("continue_final_message", False)
    arguments = {"add_generation_prompt": not go_on, **options, "chat_template": template.text}
    try:
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, **arguments)
    except Exception as error:  # a template is a program and can raise any error
        from jinja2 import TemplateError, UndefinedError

        own = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
        said = " ".join(str(error).split())[:300]
        raise _refused(
            f"the chat template of {str(folder)!r} refuses this conversation: "
            f"{said if own else f'{type(error).__name__}: {said}'}; change the messages or the arguments of the "
            "template, or pass another template with chat_template=",
            messages,
        ) from error
    return dict(cast("Mapping[str, Tensor]", inputs))


def _is_message(one: object) -> bool:
    if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
        return False
    return one.get("content") is not None or bool(one.get("tool_calls"))


def _read(number: int, message: Message, template: Template) -> dict[str, Any]:
    read = {**message, "content": _text(number, message)}
    for key in _READ:
        if message.get(key) and key not in template.keys:
            raise _refused(
                f"message {number} has {key}, and this chat template does not read that; use a model that does, pass "
                "another template with chat_template=, or say it in the content",
                message,
            )
    calls = message.get("tool_calls")
    if calls:
        read["tool_calls"] = [_call(number, call) for call in calls] if isinstance(calls, Sequence) else calls
    return read


def _text(number: int, message: Message) -> str:
    """Return the content of a message as one text; empty if it has only tool calls."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise _refused(
            f"the content of message {number} must be a text or a list of parts, got {_short(content)}", message
        )
    texts = []
    for part in content:
        kind = part.get("type", next(iter(part), "")) if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise _refused(
                f"the content of message {number} has a part of type {kind!r}; this model reads text alone: "
                'pass parts such as {"type": "text", "text": "..."}, and describe other parts in words',
                message,
            )
        texts.append(text)
    return "".join(texts)


def _call(number: int, call: object) -> object:
    """Return a tool call with its arguments as an object, which templates write as JSON themselves."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _refused(
            f'tool_calls of message {number} must be a list of {{"function": {{"name": ..., "arguments": ...}}}}, got '
            f"{_short(call)}",
            call,
        )
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        parsed = arguments  # a model's own text is passed back unchanged
    if not isinstance(parsed, Mapping):
        return call
    changed = {**function, "arguments": parsed}
    return {**call, "function": changed} if "function" in call else changed


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refused(text: str, got: object) -> WorkloadError:
    return WorkloadError(text, name="message", got=got)
