"""Submitted requests: futures, and the results of many prompts as they finish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from time import monotonic
from typing import Any

from qwen_vram.errors import QueueFullError, WorkloadError
from qwen_vram.runtime.generation.generations import Generations
from qwen_vram.runtime.requests.conversation import Message
from qwen_vram.runtime.requests.prompts import Prompt, Prompts
from qwen_vram.runtime.scheduling.job import Job

# Requests that `results` has submitted and not given yet, for each one that runs at once: enough that none is missing.
_AHEAD = 4
Answer = str | list[str]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one of many prompts.

    Attributes:
        index: The place of its prompt, from 0.
        text: The answer, or a list of several answers to the prompt; `None` after an error.
        error: The error of this prompt.
    """

    index: int
    text: Answer | None
    error: Exception | None


class Pending(Future[Answer]):
    """A submitted request: a future of the answer, or of the list of its answers.

    `cancel()` also stops a request that runs, at its next token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._job: Job[Any] | None = None

    def cancel(self) -> bool:
        """Cancel the request, and tell if that was in time. Any thread may call this, and it does not wait."""
        cancelled = super().cancel()
        if cancelled and self._job is not None:
            self._job.stop("was cancelled")
        return cancelled

    def follow(self, job: Job[Any]) -> None:
        """Note the job, and stop it if the request was cancelled."""
        self._job = job
        if self.cancelled():
            job.stop("was cancelled")

    def settle(self, read: Callable[[], Answer]) -> None:
        """Set the result of `read`, or its error."""
        try:
            answer = read()
        except BaseException as error:
            with suppress(Exception):  # it was cancelled
                self.set_exception(error)
        else:
            with suppress(Exception):
                self.set_result(answer)


class Submissions:
    """The submitted requests of a loaded model.

    Args:
        model: Returns the model, or raises the error of a closed one.

    Attributes:
        most: The most requests that are not complete; further ones are refused.
    """

    def __init__(self, model: Callable[[], Any], prompts: Prompts, generations: Generations) -> None:
        self._model, self._prompts, self._generations = model, prompts, generations
        self._most = 1000
        self._open = 0
        self._lock = Lock()

    @property
    def most(self) -> int:
        """The number, as the class says.

        Raises:
            WorkloadError: it is set to another value than a positive whole number.
        """
        return self._most

    @most.setter
    def most(self, most: int) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise WorkloadError(
                f"max_waiting must be a positive whole number of requests, got {most!r}", name="max_waiting", got=most
            )
        self._most = most

    def submit(
        self,
        message: str | Sequence[Message] | None = None,
        *,
        prompt: str | None = None,
        system: str | None = None,
        max_new_tokens: int | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> Pending:
        """Return a future as `LoadedModel.submit`."""
        if (message is None) == (prompt is None):
            raise WorkloadError("pass either a message or a prompt", name="prompt", got=prompt)
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0
        ):
            raise WorkloadError(
                f"timeout must be None or a number of seconds above 0, got {timeout!r}", name="timeout", got=timeout
            )
        deadline = None if timeout is None else monotonic() + timeout
        if message is not None:
            made = self._prompts.of_conversation(self._model(), message, system, max_new_tokens, options)
        else:
            made = self._prompts.of_texts(self._model(), [str(prompt)], max_new_tokens, options)
        return self._start(made, deadline)

    def results(
        self,
        prompts: Iterable[str | Sequence[Message]],
        *,
        max_new_tokens: int | None,
        timeout: float | None,
        ahead: int,
        options: dict[str, Any],
    ) -> Iterator[Result]:
        """Return an iterator over results as `LoadedModel.generate_many`.

        Args:
            ahead: Requests that run at once.

        Raises:
            WorkloadError: `prompts` is one text.
        """
        if isinstance(prompts, str):
            raise WorkloadError(
                "prompts must be an iterable of texts or conversations, got one text; pass [text]",
                name="prompts",
                got=prompts,
            )
        asked = {"max_new_tokens": max_new_tokens, "timeout": timeout, **options}
        return self._results(enumerate(prompts), max(1, _AHEAD * ahead), asked)

    def _results(self, prompts: Iterator[tuple[int, Any]], ahead: int, asked: dict[str, Any]) -> Iterator[Result]:
        """Yield results; `ahead` is the most requests that are submitted and not yielded yet."""
        finished: SimpleQueue[tuple[int, Pending]] = SimpleQueue()
        running: dict[int, Pending] = {}
        refused: list[tuple[int, Any]] = []  # a prompt that found the queue full
        exhausted = False
        try:
            while not exhausted or refused or running:
                while len(running) < min(ahead, self.most) and (refused or not exhausted):
                    index, prompt = refused.pop() if refused else next(prompts, (-1, ""))
                    if index < 0:
                        exhausted = True
                        break
                    what: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"message": prompt}
                    try:
                        one = self.submit(**what, **asked)
                    except QueueFullError:
                        if not running:
                            raise
                        refused.append((index, prompt))
                        break
                    except Exception as error:
                        yield Result(index, None, error)
                        continue
                    running[index] = one
                    one.add_done_callback(lambda done, index=index: finished.put((index, done)))  # type: ignore[misc]
                if running:
                    index, one = finished.get()
                    del running[index]
                    yield _result(index, one)
        finally:
            for one in running.values():
                one.cancel()

    def _start(self, made: Prompt, deadline: float | None) -> Pending:
        with self._lock:
            if self._open >= self.most:
                raise QueueFullError(
                    f"{self._open:,} submitted requests are not complete, and {self.most:,} are the most; wait for "
                    "results, or raise LoadedModel.max_waiting",
                    waiting=self._open,
                    most=self.most,
                )
            self._open += 1
        future = Pending()
        jobs: list[Job[Any]] = []

        counted = [True]

        def leave() -> None:
            with self._lock:
                self._open -= counted[0]
                counted[0] = False

        def ended() -> None:
            leave()
            future.settle(lambda: self._read(made, jobs.pop()))

        try:
            model = self._model
            job = self._generations.job(model, made.inputs, made.max_new_tokens, made.options, ended, deadline=deadline)
            jobs.append(job)
            job.start()
        except BaseException:
            leave()  # an interrupted job may end later
            raise
        future.follow(job)
        return future

    def _read(self, made: Prompt, job: Job[Any]) -> Answer:
        produced = job.result()
        new = produced[:, made.inputs["input_ids"].shape[1] :]
        answers: list[str] = self._prompts.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers if made.answers > 1 else answers[0]


async def awaited(future: Pending) -> Answer:
    """Return the answer of a future to a coroutine; if that is cancelled, the request is too."""
    return await asyncio.wrap_future(future)


def _result(index: int, one: Pending) -> Result:
    try:
        return Result(index, one.result(), None)
    except (Exception, CancelledError) as error:
        return Result(index, None, error if isinstance(error, Exception) else None)
