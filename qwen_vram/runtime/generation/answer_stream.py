"""Answers that are read while they are made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from threading import Lock
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from qwen_vram.runtime.scheduling.job import Job

# Makes the job of an answer, from a streamer that takes its tokens and what to call after its end.
MakeJob = Callable[[BaseStreamer, Callable[[], object]], "Job[Any]"]

# How long a stream that is dropped waits for its generation to end, so that its memory is free by then. Not for ever:
# the garbage collector may drop it in a thread for which the generation waits.
_PATIENCE_SECONDS = 10.0


class Tee(BaseStreamer):  # type: ignore[misc]
    """Hands tokens to several streamers of `transformers`."""

    def __init__(self, *streamers: BaseStreamer) -> None:
        self._streamers = streamers

    def put(self, value: Tensor) -> None:
        """Hand on token ids, of the prompt first."""
        for one in self._streamers:
            one.put(value)

    def end(self) -> None:
        """Say that no more come."""
        for one in self._streamers:
            one.end()


class AnswerStream(Iterator[str]):
    """Pieces of an answer, as they are made. The first `next()` starts the generation, in its turn.

    The generation goes on by itself, whether somebody reads or not. `close()` stops it from any thread, and so do the
    end of a `with` block and dropping the stream: `break` in a `for` loop over it, `del`, the garbage collector.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, make: MakeJob) -> None:
        self._closed = False
        self._job: Job[Any] | None = None
        self._starting = Lock()
        self._make: MakeJob | None = make
        self._text = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._pieces: Any = self._text.text_queue

    def __next__(self) -> str:
        """The next piece, never empty.

        Raises:
            GenerationStoppedError: the generation was stopped, but not by this stream.
            QwenVramError: as for `LoadedModel.stream`.
        """
        job = self._started()
        while job is not None and not self._closed:
            try:
                piece = self._pieces.get()
            except BaseException:  # Ctrl-C: what raised it may be kept, and this stream with it
                job.stop("was stopped by an interrupt of its reader")
                raise
            if piece is self._text.stop_signal:
                self._pieces.put(piece)  # for every `next()` to come
                job.join()
                if not self._closed:
                    job.check()
                break
            if piece and not self._closed:
                return str(piece)
        raise StopIteration

    def close(self) -> None:
        """Stop the generation, and return when it has ended; nothing more can be read. Any thread may call this."""
        job = self._stop()
        if job is not None:
            job.join()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing() or not hasattr(self, "_pieces"):  # modules are gone by then, or `__init__` failed
            return
        job = self._stop()
        if job is not None:
            job.join(_PATIENCE_SECONDS)

    def _started(self) -> Job[Any] | None:
        """The job, which starts now if it has not; `None` of a stream that was closed before."""
        with self._starting:
            if self._make is not None and not self._closed:
                pieces, end = self._pieces, self._text.stop_signal
                job = self._make(self._text, lambda: pieces.put(end))
                job.start()
                self._job, self._make = job, None
            return self._job

    def _stop(self) -> Job[Any] | None:
        self._closed = True
        with self._starting:
            self._make = None
            if self._job is not None:
                self._job.stop("was stopped by close() of its stream")
            return self._job
