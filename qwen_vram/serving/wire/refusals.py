"""Errors of the library as errors of a request."""

from __future__ import annotations

from collections.abc import Iterable

import qwen_vram as qv
from qwen_vram.serving.wire.problem import ApiError

# Fields of requests by the library's names.
_FIELDS = {
    "max_new_tokens": "max_tokens",
    "message": "messages",
    "stop_strings": "stop",
    "num_return_sequences": "n",
    "context_len": "messages",
    "prompt_len": "messages",
}


class Refusals:
    """Translator of errors, which keeps paths of this machine out of answers.

    Args:
        paths: Paths that a message may contain.
        name: The text in their place.
    """

    def __init__(self, paths: Iterable[str], name: str) -> None:
        self._paths: list[str] = []
        self._name = name
        self.hide(*paths)

    def hide(self, *paths: str) -> None:
        """Add paths that no answer may contain."""
        self._paths = sorted({*self._paths, *(path for path in paths if len(path) > 1)}, key=len, reverse=True)

    def of(self, error: BaseException, *, chat: bool) -> ApiError:
        """Return the error of a request for an error of the library or of a generation."""
        if isinstance(error, ApiError):
            return error
        if not isinstance(error, qv.QwenVramError):
            return ApiError(500, "the generation failed; the server's log names the error", code="internal_error")
        message = str(error)
        for path in self._paths:
            message = message.replace(path, self._name)
        if isinstance(error, qv.DoesNotFitError):
            facts = {"needed_bytes": error.needed_bytes, "budget_bytes": error.budget_bytes}
            exact = f"{message} ({error.needed_bytes:,} bytes are needed, {error.budget_bytes:,} are allowed)"
            return ApiError(400, exact, param=_field("context_len", chat), code="does_not_fit", facts=facts)
        if isinstance(error, qv.WorkloadError):
            code = "context_length_exceeded" if error.name in ("context_len", "prompt_len") else "invalid_value"
            return ApiError(400, message, param=_field(error.name, chat), code=code)
        if isinstance(error, qv.UnknownNameError):
            return ApiError(400, message, param=str(error.got), code="unsupported_parameter")
        if isinstance(error, qv.NotSupportedError):
            return ApiError(400, message, param=error.knob, code="unsupported_parameter")
        if isinstance(error, qv.CheckpointError):
            return ApiError(400, message, param=_field("message", chat), code="unsupported_prompt")
        if isinstance(error, qv.GenerationStoppedError):
            return ApiError(503, message, code="stopped")
        return ApiError(500, message, code="model_error")


def _field(name: str, chat: bool) -> str:
    field = _FIELDS.get(name, name)
    return "prompt" if field == "messages" and not chat else field
