"""Streams of answers, which are read while they are generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from qwen_vram.runtime.generation.job_stream import JobStream
from qwen_vram.runtime.scheduling.job import Job

# Creates the job of an answer, from a streamer for its tokens and a function to call after its end.
MakeJob = Callable[[BaseStreamer, Callable[[], object]], "Job[Any]"]


class Tee(BaseStreamer):  # type: ignore[misc]
    """Streamer that hands tokens to several streamers of `transformers`."""

    def __init__(self, *streamers: BaseStreamer) -> None:
        self._streamers = streamers

    def put(self, value: Tensor) -> None:
        """Hand on token ids, those of the prompt first."""
        for one in self._streamers:
            one.put(value)

    def end(self) -> None:
        """Tell the streamers that no more tokens follow."""
        for one in self._streamers:
            one.end()


class AnswerStream(JobStream[str]):
    """Iterator over pieces of the text of an answer while it is generated, as `JobStream` says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, make: MakeJob) -> None:
        text = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        pieces, end = text.text_queue, text.stop_signal
        super().__init__(pieces, end, lambda: make(text, lambda: pieces.put(end)))
