"""The engine: it loads the model, and runs the requests that the plan allows at once."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Event as Flag
from threading import Lock, Thread
from typing import Any

import qwen_vram as qv
from qwen_vram.serving.engine.interface import Prepared
from qwen_vram.serving.engine.preparation import prepared_on
from qwen_vram.serving.engine.token_bytes import TokenBytes
from qwen_vram.serving.engine.work_queue import Handle, WorkQueue
from qwen_vram.serving.wire.events import Began, Done, Event
from qwen_vram.serving.wire.problem import ApiError
from qwen_vram.serving.wire.refusals import Refusals
from qwen_vram.serving.wire.requests import Wanted

# Errors of torch after which no kernel of this process works. Source: torch 2.13, c10/cuda/CUDAException.cpp.
_FATAL = ("AcceleratorError", "CUDA error")
_LOADING_SECONDS = 5


class ModelEngine:
    """An engine on one loaded model, with a thread for each request that runs at once.

    The threads only wait for tokens: the model computes in a thread of its own.

    Args:
        load: Returns the loaded model; called in the engine's first thread.
        most_waiting: The most requests in the queue.
        refusals: The translator of errors.
        log: Takes a line for the log.
        ended: Called when the first thread ends, which is the last one.
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
        self._handles: set[Handle] = set()
        self._end: ApiError | None = None  # of running requests
        self._lock = Lock()
        self._over = Flag()
        self._thread = Thread(target=self._work, name="qwen-vram engine", daemon=True)

    def start(self) -> None:
        """Start the first thread, which loads the model."""
        self._thread.start()

    def state(self) -> tuple[str, str]:
        """Return the state as `Engine.state`."""
        if self._thread.ident is not None and not self._thread.is_alive() and self._state[0] in ("loading", "ready"):
            return "failed", "the engine's thread ended"
        return self._state

    def running(self) -> int:
        """Return the number of requests as `Engine.running`."""
        return len(self._handles)

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
        assert self._tokens is not None
        try:
            return prepared_on(self._llm, self._tokens, wanted)
        except Exception as error:
            self._check_open()
            self._note(error)
            raise self._refusals.of(error, chat=wanted.chat) from None

    def submit(self, prepared: Prepared, deliver: Callable[[Event], None]) -> Handle:
        """Put a request into the queue as `Engine.submit`."""
        handle = Handle(partial(self._run, prepared), deliver, places=len(prepared.answers))
        self.queue.put(handle)
        return handle

    def drain(self) -> None:
        """Take no more requests, end the waiting ones, and let the running ones finish. It does not wait."""
        if self._state[0] in ("loading", "ready"):
            self._state = ("stopping", "the server is stopping")
        self.queue.close(ApiError(503, "the server is stopping; ask another one", code="server_stopping"))

    def stop_running(self) -> None:
        """End the running requests with an error, at their next token. It does not wait."""
        self._end_running(ApiError(503, "the server stopped before the answer was complete", code="server_stopping"))

    def loaded(self) -> bool:
        """Tell if the load is over."""
        return self._llm is not None or self.load_error is not None

    def join(self, timeout: float) -> bool:
        """Wait for the end of the threads, and tell if they ended."""
        return self._thread.ident is None or self._over.wait(timeout)

    def _work(self) -> None:
        """Run the first thread."""
        others: list[Thread] = []
        try:
            self._llm = self._load()
            self._tokens = TokenBytes(self._llm.tokenizer)
            self._refusals.hide(str(self._llm.tokenizer.name_or_path))
            self.queue.open(self._llm.plan.concurrency)
            others += [Thread(target=self._help, daemon=True) for _ in range(self._llm.plan.concurrency - 1)]
            for one in others:
                one.start()
            if self._state[0] == "loading":
                self._state = ("ready", "")
                self._log("ready")
            self._serve_all()
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
            for one in others:
                one.join()
            if self._llm is not None:
                with suppress(Exception):  # a broken device frees nothing
                    self._llm.close()
            self._over.set()
            self._ended()

    def _help(self) -> None:
        """Run another thread."""
        try:
            self._serve_all()
        except BaseException as error:
            self._fail(_named(error))
            self._note(error)

    def _serve_all(self) -> None:
        """Run requests until the queue is closed."""
        while (handle := self.queue.take()) is not None:
            self._serve(handle)
            del handle

    def _serve(self, handle: Handle) -> None:
        began = time.monotonic()
        handle.begun = True
        with self._lock:
            self._handles.add(handle)
            end = self._end
        try:
            if end is not None:
                handle.fail(end)
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
            with self._lock:
                self._handles.discard(handle)
            handle.run = _nothing
            self.queue.over(handle, time.monotonic() - began)

    def _run(self, prepared: Prepared, handle: Handle) -> None:
        """Run the answers of one request, together if the plan has pages for several."""
        streams = [answer.stream for answer in prepared.answers]
        try:
            handle.runs(*streams)
            for answer in prepared.answers:
                answer.begin(handle.deliver)
                answer.stream.start()
            for answer in prepared.answers:
                for _ in answer.stream:
                    pass
                if handle.cancelled:
                    return
                answer.finish()
            handle.deliver(Done())
        finally:
            self._took(prepared.prompt_tokens, sum(answer.made for answer in prepared.answers))
            handle.runs()
            for stream in streams:
                stream.stop()
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
        """Take no more requests, and end the waiting and the running ones."""
        if self._state[0] != "failed":
            self._state = ("failed", reason)
        error = ApiError(503, f"the server cannot answer: {reason}", code="server_failed")
        self.queue.close(error)
        self._end_running(error)

    def _end_running(self, error: ApiError) -> None:
        with self._lock:
            self._end, running = error, tuple(self._handles)
        for handle in running:
            handle.fail(error)

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
