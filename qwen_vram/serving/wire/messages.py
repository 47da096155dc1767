"""Messages and tools of a chat request, checked and reduced to what a chat template reads."""

from __future__ import annotations

import re
from typing import Any

from qwen_vram.serving.wire.body import parsed
from qwen_vram.serving.wire.fields import Fields
from qwen_vram.serving.wire.problem import ApiError, shown, wrong

# Roles of OpenAI's chat messages, with their names in chat templates.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_MAX_MESSAGES = 4096
_MAX_TOOLS = 128
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


def read_messages(given: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation.

    Raises:
        ApiError: they are not messages.
    """
    if not isinstance(given, list) or not given:
        raise wrong(f"messages must be a list of messages, not empty, got {shown(given)}", "messages")
    if len(given) > _MAX_MESSAGES:
        raise wrong(f"messages must be at most {_MAX_MESSAGES:,}, got {len(given):,}", "messages")
    return [_message(one, f"messages[{number}]") for number, one in enumerate(given)]


def read_tools(given: Any) -> list[dict[str, Any]]:
    """Return the tools of a request.

    Raises:
        ApiError: they are not functions with names.
    """
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > _MAX_TOOLS:
        raise wrong(f"tools must be a list of at most {_MAX_TOOLS} functions, got {shown(given)}", "tools")
    names = set()
    for number, tool in enumerate(given):
        where = f"tools[{number}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise wrong(f'{where} must be {{"type": "function", "function": {{...}}}}, got {shown(tool)}', where)
        fields = Fields(tool["function"], f"{where}.function.")
        name = fields.text("name")
        if name is None or not _TOOL_NAME.match(name):
            raise wrong(
                f"{where}.function.name must be 1 to 64 letters, digits, dots, dashes or underscores, got "
                f"{shown(name)}",
                f"{where}.function.name",
            )
        if name in names:
            raise wrong(f"{where}.function.name is {name!r} for a second time", f"{where}.function.name")
        names.add(name)
        fields.text("description")
        fields.object("parameters")
    return given


def _message(one: Any, where: str) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise wrong(f'{where} must be {{"role": ..., "content": ...}}, got {shown(one)}', where)
    fields = Fields(one, f"{where}.")
    role = fields.text("role")
    if role not in _ROLES:
        raise wrong(f"{where}.role must be one of {', '.join(_ROLES)}, got {shown(role)}", f"{where}.role")
    message: dict[str, Any] = {"role": _ROLES[role]}
    calls = fields.list("tool_calls")
    if calls:
        if role != "assistant":
            raise wrong(f"{where}.tool_calls is for assistant messages alone", f"{where}.tool_calls")
        message["tool_calls"] = [_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    message["content"] = _content(one.get("content"), where, optional=bool(calls))
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = fields.text(name)
        if value is not None:
            message[name] = value
    return message


def _content(content: Any, where: str, *, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list) or not content:
        raise wrong(f"{where}.content must be a text or a list of parts, got {shown(content)}", f"{where}.content")
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ApiError(
                400,
                f"{where}.content[{at}] has the type {shown(kind)}; this model reads text alone: send "
                '{"type": "text", "text": ...}',
                param=f"{where}.content[{at}]",
                code="unsupported_content",
            )
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise wrong(f'{where} must be {{"function": {{"name": ..., "arguments": ...}}}}, got {shown(call)}', where)
    fields = Fields(function, f"{where}.function.")
    name, arguments = fields.text("name"), fields.text("arguments")
    if not name:
        raise wrong(f"{where}.function.name must be a text, not empty, got {shown(name)}", f"{where}.function.name")
    value: Any = arguments or "{}"
    try:
        value = parsed(value, f"{where}.function.arguments")
    except ApiError as error:
        if "is not JSON" not in str(error):
            raise
    return {"type": "function", "function": {"name": name, "arguments": value}}
