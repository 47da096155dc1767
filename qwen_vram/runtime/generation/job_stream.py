"""Streams of a job: pieces that a generation makes, read from a queue while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from threading import Lock
from types import TracebackType
from typing import Any, Generic, TypeVar

from qwen_vram.runtime.scheduling.job import Job

Piece = TypeVar("Piece")

# The time that a dropped stream waits for its generation to end, so that its memory is free. The time is limited: the
# garbage collector may drop the stream in a thread for which the generation waits.
_PATIENCE_SECONDS = 10.0


class JobStream(Iterator[Piece], Generic[Piece]):
    """Iterator over pieces of an answer while it is generated. The first `next()` starts the generation, in its turn.

    The generation continues if nobody reads. `close()` stops it from any thread, and so does the end of a `with` block.
    Dropping the stream stops it too: `break` in a `for` loop over it, `del`, or the garbage collector.

    Args:
        pieces: The queue that the generation fills; empty pieces are left out.
        end: The object in the queue that follows the last piece.
        make: Returns the job, which puts `end` into the queue after its end.
    """

    def __init__(self, pieces: Any, end: object, make: Callable[[], Job[Any]]) -> None:
        self._closed = False
        self._job: Job[Any] | None = None
        self._starting = Lock()
        self._make: Callable[[], Job[Any]] | None = make
        self._end = end
        self._pieces = pieces

    def __next__(self) -> Piece:
        """Return the next piece, which is never empty.

        Raises:
            GenerationStoppedError: the generation was stopped, but not by this stream.
            QwenVramError: as for `LoadedModel.stream`.
        """
        job = self._started()
        while job is not None and not self._closed:
            try:
                piece: Piece = self._pieces.get()
            except BaseException:  # Ctrl-C: its traceback may be kept, and this stream with it
                job.stop("was stopped by an interrupt of its reader")
                raise
            if piece is self._end:
                self._pieces.put(piece)  # for every later `next()`
                job.join()
                if not self._closed:
                    job.check()
                break
            if piece and not self._closed:
                return piece
        raise StopIteration

    def start(self) -> None:
        """Start the generation without reading, so that streams of one thread run together if the plan allows it."""
        self._started()

    def stop(self) -> None:
        """Stop the generation at its next token, without waiting, from any thread; nothing more can be read."""
        self._stop()

    def close(self) -> None:
        """Stop the generation, and wait for its end; nothing more can be read. Any thread may call this."""
        job = self._stop()
        if job is not None:
            job.join()

    def __enter__(self) -> JobStream[Piece]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing() or not hasattr(self, "_pieces"):  # modules may be gone, or `__init__` failed
            return
        job = self._stop()
        if job is not None:
            job.join(_PATIENCE_SECONDS)

    def _started(self) -> Job[Any] | None:
        """Return the job, and start it if needed; `None` for a stream that was closed before."""
        with self._starting:
            if self._make is not None and not self._closed:
                job = self._make()
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
