"""The errors that the library raises on purpose.

    QwenVramError
    ├── UnitError (ValueError)                 a size without a unit, or not a size
    ├── UnknownNameError (ValueError)          an unknown model, profile, format, knob, option or device
    ├── WorkloadError (ValueError)             a length, batch, message or option that cannot be run
    ├── ConfigError (ValueError)               a config.json that is missing, broken or of another architecture
    ├── CheckpointError                        safetensors that are missing, truncated, corrupt or somewhere else
    ├── HubError                               a hub that does not answer, or lacks what was asked for
    ├── NotFiniteError                         a model that computes NaN or infinities
    ├── NotSupportedError                      a knob or combination that is counted but cannot be run
    ├── BackendUnavailableError (ImportError)  a library or device that is not on this machine
    ├── DoesNotFitError                        a budget that nothing fits (`planning.errors`)
    ├── QuantizationFailedError                a quantizer's process that failed
    ├── GenerationStoppedError                 a generation that another caller stopped
    └── PlanNotHeldError                       a loaded model that takes more memory than its plan promised

A message says what failed, what was got, what is allowed and what to do next. Attributes hold the same facts, so a
program does not have to parse the text.
"""

from __future__ import annotations


class QwenVramError(Exception):
    """Base of every error that this library raises on purpose."""


class UnitError(QwenVramError, ValueError):
    """A size has no unit or is not a size. `got` is the value that was passed."""

    def __init__(self, message: str, *, got: object) -> None:
        super().__init__(message)
        self.got = got


class UnknownNameError(QwenVramError, ValueError):
    """A name is not known. `kind` says what it names, `got` is the name, and `allowed` lists the known ones."""

    def __init__(self, kind: str, got: object, allowed: tuple[str, ...], *, hint: str = "") -> None:
        choices = ", ".join(allowed)
        super().__init__(f"unknown {kind} {got!r}; choose from {choices}" + (f"; {hint}" if hint else ""))
        self.kind = kind
        self.got = got
        self.allowed = allowed


class WorkloadError(QwenVramError, ValueError):
    """A workload, a message or an option cannot be run. `name` and `got` are the quantity and its value."""

    def __init__(self, message: str, *, name: str, got: object) -> None:
        super().__init__(message)
        self.name = name
        self.got = got


class ConfigError(QwenVramError, ValueError):
    """A model configuration cannot be used. `source` says where it came from."""

    def __init__(self, message: str, *, source: str = "") -> None:
        super().__init__(message)
        self.source = source


class CheckpointError(QwenVramError):
    """A checkpoint's files cannot be used. `path` is the file or folder at fault."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class HubError(QwenVramError):
    """The hub did not give a file. `repo_id` is the repository that was asked for."""

    def __init__(self, message: str, *, repo_id: str) -> None:
        super().__init__(message)
        self.repo_id = repo_id


class NotFiniteError(QwenVramError):
    """A model's logits are NaN or infinite.

    Attributes:
        dtype: The dtype that the model computes in, such as `"fp16"`.
        module: The first module whose output is not finite, by its name in the model; empty if it was not found.
    """

    def __init__(self, message: str, *, dtype: str, module: str) -> None:
        super().__init__(message)
        self.dtype = dtype
        self.module = module


class NotSupportedError(QwenVramError):
    """A knob or a combination is counted by the estimator but cannot be run. `knob` and `value` name it."""

    def __init__(self, message: str, *, knob: str, value: object) -> None:
        super().__init__(message)
        self.knob = knob
        self.value = value


class BackendUnavailableError(QwenVramError, ImportError):
    """A backend, library or device is not available here. `backend` names it, `install` is the command that helps."""

    def __init__(self, message: str, *, backend: str, install: str = "") -> None:
        super().__init__(message)
        self.backend = backend
        self.install = install


class QuantizationFailedError(QwenVramError):
    """A quantizer's process failed. `returncode` is its exit status, and `log` is the end of its output."""

    def __init__(self, message: str, *, returncode: int, log: str) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.log = log


class GenerationStoppedError(QwenVramError):
    """Another caller stopped the generation. `tokens` is the number of new tokens of each sequence by then."""

    def __init__(self, message: str, *, tokens: int) -> None:
        super().__init__(message)
        self.tokens = tokens


class QueueFullError(QwenVramError):
    """Too many submitted requests are not complete. `waiting` is their number, and `most` the limit."""

    def __init__(self, message: str, *, waiting: int, most: int) -> None:
        super().__init__(message)
        self.waiting = waiting
        self.most = most


class PlanNotHeldError(QwenVramError):
    """A loaded model takes more memory than its plan promised.

    Attributes:
        parts: Predicted and measured bytes of each part that is too large; empty if memory ran out.
    """

    def __init__(self, message: str, *, parts: dict[str, tuple[int, int]]) -> None:
        super().__init__(message)
        self.parts = parts
