"""Parsing of JSON from UTF-8, with the cause, line and column of an error."""

from __future__ import annotations

import json
from collections.abc import Callable

from qwen_vram.errors import QwenVramError

# First bytes of texts that an editor saved in another encoding. Source: the Unicode Standard, section 23.8.
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
MARK = b"\xef\xbb\xbf"


def parse_json(data: bytes, source: str, refusal: Callable[[str], QwenVramError]) -> object:
    """Return the value of a JSON text, with or without a byte-order mark.

    Args:
        refusal: Makes the error of a message.

    Raises:
        QwenVramError: what `refusal` makes; the message names the cause, the place and the cure.
    """
    try:
        text = data.removeprefix(MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(f"{source!r} {_not_utf8(data, error)}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise refusal(f"{source!r} {_not_json(data, text, error)}") from error
    except RecursionError as error:
        raise refusal(f"{source!r} is not JSON that can be read: its brackets are nested too deeply") from error


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    from qwen_vram.checkpoints.files.contents import mistaken

    if data.startswith(_UTF16):
        return "is text in UTF-16, as some Windows editors save it; save it as UTF-8"
    found = mistaken(data)
    if found:
        return found
    before = data[: error.start]
    line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
    return f"is not UTF-8 text (line {line}, byte {column} of it: 0x{data[error.start]:02x}); save it as UTF-8"


def _not_json(data: bytes, text: str, error: json.JSONDecodeError) -> str:
    from qwen_vram.checkpoints.files.contents import mistaken

    if not text.strip():
        return "is cut off: the file is empty; download the file again"
    found = mistaken(data)
    if found:
        return found
    position = error.pos
    before, rest = text[:position].rstrip(), text[position:].lstrip()
    if rest.startswith(",") and rest[1:].lstrip()[:1] in ("}", "]"):  # Python 3.13 stops at the comma itself
        before, rest = before + ",", rest[1:].lstrip()
    if not rest or (error.msg.startswith("Unterminated string") and '"' not in text[position + 1 :]):
        return (
            f"is cut off in line {text.rstrip().count(chr(10)) + 1}: a download or an editor stopped there; download "
            "the file again, or write what is missing"
        )
    what, cure = _cause(before, rest, error.msg)
    at = len(before) - 1 if what == _COMMA else position + len(text[position:]) - len(text[position:].lstrip())
    line = text.count("\n", 0, at) + 1
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    return f"is not JSON: {what} in line {line}, column {column}; {cure}"


_COMMA = "a comma before the closing bracket"


def _cause(before: str, rest: str, message: str) -> tuple[str, str]:
    """Return the text at which a JSON parser stopped, and the step that helps."""
    first = rest[0]
    if first in "}]" and before.endswith(","):
        return _COMMA, "remove the comma"
    if rest.startswith(("//", "/*", "#")):
        return "a comment", "JSON has no comments: remove it"
    if first in "\u201c\u201d\u201e\u2018\u2019":
        return "a curly quotation mark", 'write straight double quotation marks (")'
    if first == "'":
        return "a single quotation mark", 'JSON has double quotation marks alone: write "'
    word = next((word for word in ("True", "False", "None") if rest.startswith(word)), "")
    if word:
        return f"Python's {word}", "write " + {"True": "true", "False": "false", "None": "null"}[word]
    if "delimiter: ','" in message or "',' delimiter" in message:
        return "a missing comma", "put a comma between the two entries"
    if message.startswith("Extra data"):
        return "more text after the end of the object", "keep one object, from the first { to its }"
    return f"{rest[:12].splitlines()[0]!r} ({message})", "correct it, or take the file of the repository"
