"""The engine: one thread loads the model, and runs requests in order."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Event as Flag
from threading import Thread
from typing import Any, Protocol

import qwen_vram as qv
from qwen_vram.serving.engine.answer import Answer
from qwen_vram.serving.engine.answer_text import AnswerText
from qwen_vram.serving.engine.token_bytes import TokenBytes
from qwen_vram.serving.engine.tool_calls import ToolCalls
from qwen_vram.serving.engine.work_queue import Handle, WorkQueue
from qwen_vram.serving.wire.events import Began, Done, Event
from qwen_vram.serving.wire.problem import ApiError
from qwen_vram.serving.wire.refusals import Refusals
from qwen_vram.serving.wire.requests import Wanted

# Errors of torch after which no kernel of this process works. Source: torch 2.13, c10/cuda/CUDAException.cpp.
_FATAL = ("AcceleratorError", "CUDA error")
_LOADING_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request with its answers, which have not started."""

    answers: tuple[Answer, ...]
    prompt_tokens: int


class Engine(Protocol):
    """Runner of requests. The web server uses these names alone, so another engine can replace this one."""

    queue: WorkQueue

    def prepare(self, wanted: Wanted) -> Prepared:
        """Check a request completely, and raise an `ApiError` if it cannot run. It allocates nothing on the device."""

    def submit(self, prepared: Prepared, deliver: Callable[[Event], None]) -> Handle:
        """Put a request into the queue, or raise an `ApiError`; its events are delivered from any thread."""

    def state(self) -> tuple[str, str]:
        """Return `loading`, `ready`, `stopping` or `failed`, with a reason."""

    def running(self) -> int:
        """Return the number of requests that run now."""

    def report(self) -> dict[str, Any]:
        """Return predicted and measured memory as `qv.LoadedModel.report().to_dict()`; empty before the load."""


class OneByOne:
    """An engine that runs one request at a time.

    Args:
        load: Returns the loaded model; called in the engine's thread.
        most_waiting: The most requests in the queue.
        refusals: The translator of errors.
        log: Takes a line for the log.
        ended: Called when the thread ends.
        took: Takes the numbers of tokens of the prompts and of the answers of a request that ran.

    Attributes:
        load_error: The error of the load.
    """

    def __init__(
        self,
        load: Callable[[], qv.LoadedModel],
        *,
        most_waiting: int,
        refusals: Refusals,
        log: Callable[[str], None],
        ended: Callable[[], None],
        took: Callable[[int, int], None],
    ) -> None:
        self.queue = WorkQueue(most_waiting)
        self.load_error: BaseException | None = None
        self._load = load
        self._refusals, self._log, self._ended, self._took = refusals, log, ended, took
        self._llm: qv.LoadedModel | None = None
        self._tokens: TokenBytes | None = None
        self._state = ("loading", "the model is being loaded")
        self._handle: Handle | None = None
        self._over = Flag()
        self._thread = Thread(target=self._work, name="qwen-vram engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the model first."""
        self._thread.start()

    def state(self) -> tuple[str, str]:
        """Return the state as `Engine.state`."""
        if self._thread.ident is not None and not self._thread.is_alive() and self._state[0] in ("loading", "ready"):
            return "failed", "the engine's thread ended"
        return self._state

    def running(self) -> int:
        """Return 1 if a request runs."""
        return int(self._handle is not None)

    def report(self) -> dict[str, Any]:
        """Return the report as `Engine.report`."""
        llm = self._llm
        return {} if llm is None else llm.report().to_dict()

    def refuse_unless_ready(self) -> None:
        """Raise the error of a server that takes no requests now.

        Raises:
            ApiError: the model is being loaded, or the engine ended or is about to (503).
        """
        state, reason = self.state()
        if state != "ready":
            headers = {"Retry-After": str(_LOADING_SECONDS)} if state == "loading" else {}
            raise ApiError(503, f"the server is not ready ({state}): {reason}", code=f"server_{state}", headers=headers)

    def prepare(self, wanted: Wanted) -> Prepared:
        """Check a request as `Engine.prepare`."""
        self.refuse_unless_ready()
        assert self._llm is not None
        llm, tokenizer = self._llm, self._llm.tokenizer
        names = frozenset(tool["function"]["name"] for tool in wanted.tools)
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        options: dict[str, Any] = {**wanted.sampling, "max_new_tokens": wanted.max_tokens, "logprobs": wanted.logprobs}
        if wanted.chat:
            options |= {"chat_template_kwargs": wanted.template} if wanted.template else {}
            options |= {"tools": wanted.tools} if wanted.tools else {}
        answers, prompt_tokens = [], 0
        try:
            for place, prompt in enumerate(wanted.prompts or ("",)):
                asked: dict[str, Any] = {"message": wanted.messages} if wanted.chat else {"prompt": prompt}
                for number in range(wanted.answers):
                    answer = Answer(
                        place * wanted.answers + number,
                        AnswerText(decode, wanted.stops),
                        ToolCalls(names) if names else None,
                        None if wanted.logprobs is None else self._tokens,
                    )
                    seed: dict[str, Any] = {} if wanted.seed is None else {"seed": (wanted.seed + answer.index) % 2**64}
                    answer.stream = llm.tokens(**asked, **options, **seed, until=answer.take)
                    answers.append(answer)
                prompt_tokens += answers[-1].stream.prompt_tokens
        except Exception as error:
            self._check_open()
            self._note(error)
            raise self._refusals.of(error, chat=wanted.chat) from None
        return Prepared(tuple(answers), prompt_tokens)

    def submit(self, prepared: Prepared, deliver: Callable[[Event], None]) -> Handle:
        """Put a request into the queue as `Engine.submit`."""
        handle = Handle(partial(self._run, prepared), deliver)
        self.queue.put(handle)
        return handle

    def drain(self) -> None:
        """Take no more requests, end the waiting ones, and let the running one finish. It does not wait."""
        if self._state[0] in ("loading", "ready"):
            self._state = ("stopping", "the server is stopping")
        self.queue.close(ApiError(503, "the server is stopping; ask another one", code="server_stopping"))

    def stop_running(self) -> None:
        """End the running request with an error, at its next token. It does not wait."""
        handle = self._handle
        if handle is not None:
            handle.fail(ApiError(503, "the server stopped before the answer was complete", code="server_stopping"))

    def loaded(self) -> bool:
        """Tell if the load is over."""
        return self._llm is not None or self.load_error is not None

    def join(self, timeout: float) -> bool:
        """Wait for the end of the thread, and tell if it ended."""
        return self._thread.ident is None or self._over.wait(timeout)

    def _work(self) -> None:
        """Run the thread."""
        try:
            self._llm = self._load()
            self._tokens = TokenBytes(self._llm.tokenizer)
            self._refusals.hide(str(self._llm.tokenizer.name_or_path))
            if self._state[0] == "loading":
                self._state = ("ready", "")
                self._log("ready")
            while (handle := self.queue.take()) is not None:
                self._serve(handle)
                del handle
        except BaseException as error:
            if self._llm is None:
                self.load_error = error
            self._fail(
                f"the model could not be loaded ({type(error).__name__})" if self._llm is None else _named(error)
            )
            self._note(error)
        finally:
            if self._state[0] != "stopping":
                self._fail("the engine's thread ended")
            if self._llm is not None:
                with suppress(Exception):  # a broken device frees nothing
                    self._llm.close()
            self._over.set()
            self._ended()

    def _serve(self, handle: Handle) -> None:
        began = time.monotonic()
        handle.begun, self._handle = True, handle
        try:
            handle.deliver(Began())
            handle.run(handle)
        except Exception as error:
            self._note(error)
            handle.fail(self._refusals.of(error, chat=True))
            if _is_fatal(error):
                raise
            self._check_open()
        except BaseException as error:
            handle.fail(ApiError(503, f"the server cannot answer: {_named(error)}", code="server_failed"))
            raise
        finally:
            self._handle = None
            handle.run = _nothing
            self.queue.took(time.monotonic() - began)

    def _run(self, prepared: Prepared, handle: Handle) -> None:
        """Run the answers of one request, one after the other."""
        try:
            for answer in prepared.answers:
                if handle.cancelled:
                    break
                answer.begin(handle.deliver)
                handle.runs(answer.stream)
                for _ in answer.stream:
                    pass
                if not handle.cancelled:
                    answer.finish()
                handle.runs(None)
            if not handle.cancelled:
                handle.deliver(Done())
        finally:
            self._took(prepared.prompt_tokens, sum(answer.made for answer in prepared.answers))
            handle.runs(None)
            for answer in prepared.answers:
                answer.stream.close()
                answer.drop()

    def _check_open(self) -> None:
        """Note that the model was closed from outside, after which no request runs.

        Raises:
            ApiError: it is closed.
        """
        assert self._llm is not None
        try:
            _ = self._llm.model
        except qv.QwenVramError as error:
            self._fail(str(error))
            self.refuse_unless_ready()

    def _fail(self, reason: str) -> None:
        if self._state[0] != "failed":
            self._state = ("failed", reason)
        self.queue.close(ApiError(503, f"the server cannot answer: {reason}", code="server_failed"))

    def _note(self, error: BaseException) -> None:
        """Log an unexpected error by its kind and place; its text may contain parts of a request."""
        if isinstance(error, (ApiError, qv.QwenVramError)) and self._llm is not None:
            return
        place = traceback.extract_tb(error.__traceback__)
        at = "; ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in place[-3:])
        self._log(f"error {type(error).__name__} at {at}")


def _nothing(handle: Handle) -> None:
    """Replace the work of a request that is over."""


def _is_fatal(error: BaseException) -> bool:
    return type(error).__name__ in _FATAL or any(word in str(error) for word in _FATAL)


def _named(error: BaseException) -> str:
    return str(error) if isinstance(error, qv.QwenVramError) else f"the engine ended by {type(error).__name__}"
