"""The error of a request, with its status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request cannot be answered.

    Attributes:
        status: The HTTP status.
        param: The field of the request at fault.
        code: A word for programs, such as `"context_length_exceeded"`.
        headers: Headers of the answer.
        facts: More fields of the error object, such as the bytes that are missing.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.facts = dict(facts or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code, **self.facts}}


# Source: https://platform.openai.com/docs/guides/error-codes
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def wrong(message: str, param: str | None, code: str | None = None) -> ApiError:
    """Return the error of a request whose field `param` is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(name: str, why: str) -> ApiError:
    """Return the error of a request with a field that would change the answer and is not supported."""
    return ApiError(400, f"{name} is not supported here: {why}", param=name, code="unsupported_parameter")


def shown(value: object) -> str:
    """Return a value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
