"""State of a server in front of vLLM, and the figures that vLLM has stated."""

from __future__ import annotations

from threading import Lock
from typing import Literal, NamedTuple

from qwen_vram.serving.vllm.startup_log import Reported

StateName = Literal["loading", "ready", "stopping", "failed"]


class State(NamedTuple):
    """A state as `/health` answers it, with its reason."""

    name: StateName
    reason: str


class Progress:
    """The state and the figures, which a thread reads from vLLM's log while others ask for them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._state = State("loading", "vLLM starts")
        self._reported = Reported()

    @property
    def state(self) -> State:
        """The state now."""
        with self._lock:
            return self._state

    @property
    def reported(self) -> Reported:
        """The figures that the log has stated by now."""
        with self._lock:
            return self._reported

    def read(self, line: str) -> None:
        """Take the figures of a line of the log."""
        with self._lock:
            self._reported = self._reported.read(line)

    def change(self, name: StateName, reason: str) -> None:
        """Enter a state. A server that failed or stops does not become ready again."""
        with self._lock:
            if self._state.name in ("failed", "stopping") and name in ("loading", "ready"):
                return
            self._state = State(name, reason)
