"""Bodies of requests: JSON of limited depth in UTF-8, finite numbers, whole characters."""

from __future__ import annotations

import json
from typing import Any

from qwen_vram.serving.wire.problem import ApiError, shown

# The deepest nesting of a body. Schemas of tools are the deepest parts of real requests, with some ten levels.
MAX_DEPTH = 64


def parsed_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        ApiError: it is not such an object.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"the body is not UTF-8 (byte {error.start:,}); send JSON in UTF-8") from None
    value = parsed(text, "the body")
    if not isinstance(value, dict):
        raise _refused(f"the body must be a JSON object, got {shown(value)}")
    return value


def parsed(text: str, where: str) -> Any:
    """Return the value of a JSON text; `where` names the text in errors.

    Raises:
        ApiError: it is not JSON, nested too deeply, or has half of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if _depth_over(value, MAX_DEPTH):
            raise RecursionError
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _refused(f"{where} is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeEncodeError:
        raise _refused(f"{where} has half of a surrogate pair, which is no character; send whole characters") from None
    except json.JSONDecodeError as error:
        raise _refused(f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a constant, or a number with thousands of digits
        said = str(error) if isinstance(error, _ConstantError) else "a number has too many digits"
        raise _refused(f"{where} is not JSON: {said}") from None
    return value


class _ConstantError(ValueError):
    pass


def _no_constant(name: str) -> Any:
    raise _ConstantError(f"{name} is not a JSON number")


def _depth_over(value: Any, limit: int) -> bool:
    """Tell if containers are nested deeper than `limit`."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(each for each in one.values() if isinstance(each, (dict, list)))
            elif isinstance(one, list):
                inner.extend(each for each in one if isinstance(each, (dict, list)))
        if not inner:
            return False
        level = inner
    return True


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
