"""Disk layers: a thread reads them ahead of use into a ring of host buffers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from threading import Condition, Thread
from typing import Any

from torch import Tensor

from qwen_vram.errors import QwenVramError
from qwen_vram.runtime.tensors.file_extents import FileExtents

# Interval at which a waiting forward pass checks that the thread still runs.
_LOOK_SECONDS = 1.0


class Buffer:
    """A host buffer for one block: the number of its block, and the state of reading it.

    `copied` is an event that the last copy from it records; `None` if copies are synchronous.
    """

    def __init__(self, memory: Tensor, copied: Any) -> None:
        self.memory, self.copied = memory, copied
        self.view = memory.numpy().data
        self.number: int | None = None
        self.ready = False
        self.error: BaseException | None = None


class DiskReader:
    """Reader that keeps the next blocks in the buffers; blocks are used in a circle.

    Another order works too, but is slower. One thread at a time may take blocks.
    """

    def __init__(self, images: Sequence[FileExtents], buffers: Sequence[Buffer]) -> None:
        self._ring = _Ring(images, buffers)
        self._thread = Thread(target=_work, args=(self._ring,), name="qwen-vram disk reader", daemon=True)
        self._stop = weakref.finalize(self, self._ring.stop)
        self._thread.start()

    def is_ready(self, number: int) -> bool:
        """Tell if block `number` can be taken without waiting."""
        with self._ring.changed:
            buffer = self._ring.ready(number)
            return buffer is not None and buffer.error is None

    def take(self, number: int) -> Buffer:
        """Return the buffer of block `number` when it is read. The buffer keeps the block until `passed`.

        Raises:
            CheckpointError: it cannot be read. The next call tries again.
        """
        ring = self._ring
        with ring.changed:
            ring.want(number)
            while (buffer := ring.ready(number)) is None:
                if not self._thread.is_alive():
                    raise QwenVramError(
                        "the thread that reads disk layers is gone: the model is closed, or this process was forked "
                        "off the one that loaded it; load it again here"
                    )
                ring.changed.wait(_LOOK_SECONDS)
            if buffer.error is not None:
                error, buffer.error, buffer.number = buffer.error, None, None
                raise error
            return buffer

    def passed(self, number: int) -> None:
        """Continue reading: the copy of block `number` has been started, and records its buffer's event."""
        with self._ring.changed:
            self._ring.want(number + 1)

    def close(self) -> None:
        """End the thread, and release buffers and files; no copy may be running."""
        self._stop()
        self._thread.join()
        self._ring.buffers, self._ring.images = [], []


class _Ring:
    """State shared between the reading thread and the caller, under the lock of `changed`, without the model."""

    def __init__(self, images: Sequence[FileExtents], buffers: Sequence[Buffer]) -> None:
        self.images, self.buffers = list(images), list(buffers)
        self.changed = Condition()
        self.closed = False
        self._next = 0

    def ready(self, number: int) -> Buffer | None:
        return next((buffer for buffer in self.buffers if buffer.number == number and buffer.ready), None)

    def want(self, number: int) -> None:
        """Make block `number` the next one to use, and try failed reads again."""
        self._next = number
        for buffer in self.buffers:
            if buffer.ready and buffer.error is not None:
                buffer.number = buffer.error = None
        self.changed.notify_all()

    def job(self) -> tuple[Buffer, FileExtents] | None:
        """Return the next block to read and a free buffer, when there are both; `None` at the end."""
        with self.changed:
            while not self.closed:
                wanted = [(self._next + step) % len(self.images) for step in range(len(self.buffers))]
                held = [buffer.number for buffer in self.buffers]
                missing = next((number for number in wanted if number not in held), None)
                if missing is not None:
                    buffer = next(buffer for buffer in self.buffers if buffer.number not in wanted)
                    buffer.number, buffer.ready = missing, False
                    return buffer, self.images[missing]
                self.changed.wait()
        return None

    def done(self, buffer: Buffer, error: BaseException | None) -> None:
        with self.changed:
            buffer.ready, buffer.error = True, error
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def _work(ring: _Ring) -> None:
    """Run the thread: read the next wanted block, until the end."""
    while (job := ring.job()) is not None:
        buffer, image = job
        failure = None
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            image.read_into(buffer.view)
        except BaseException as error:  # passed to the forward pass that needs the block
            failure = error
        ring.done(buffer, failure)
        del job, buffer, image, failure
