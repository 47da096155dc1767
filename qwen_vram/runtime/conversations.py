"""Conversations that keep their KV cache, so that a turn feeds only new tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from threading import Lock
from types import TracebackType
from typing import Any

from transformers.generation.streamers import BaseStreamer

from qwen_vram.errors import NotSupportedError, QwenVramError, WorkloadError
from qwen_vram.runtime.generation.answer_stream import AnswerStream, Tee
from qwen_vram.runtime.generation.asked import Asked
from qwen_vram.runtime.generation.generations import Generations
from qwen_vram.runtime.generation.kept_cache import Claim, Owner
from qwen_vram.runtime.requests.conversation import Message
from qwen_vram.runtime.requests.prompts import Prompt, Prompts
from qwen_vram.runtime.scheduling.job import Job


class Conversation:
    """A conversation with a loaded model, from `LoadedModel.conversation()`.

    Each turn renders all messages by the chat template. The tokens that the cache already holds are not fed again, up
    to the first token that differs. The answers are those of `LoadedModel.chat(messages)`.

    The cache is the plan's, and a model has one. Any other generation of the model frees it, and so does the turn of
    another conversation. The next turn then feeds all messages again.

    Threads may share it: a turn waits for the one before it.

    Attributes:
        messages: The messages so far, as a list that may be changed between turns.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        prompts: Prompts,
        generations: Generations,
        *,
        system: str | None,
        max_new_tokens: int | None,
        options: dict[str, Any],
    ) -> None:
        self._model, self._prompts, self._generations = model, prompts, generations
        self._max_new_tokens, self._options = max_new_tokens, options
        self._owner = Owner()
        self._busy = Lock()
        self._checked([{"role": "user", "content": "hi"}], system, None, {})
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Conversation of {len(self.messages)} messages{', closed' if self._owner.closed else ''}>"

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing() and hasattr(self, "_busy"):
            self.close()

    def say(
        self, message: str | Sequence[Message] | None = None, *, max_new_tokens: int | None = None, **options: Any
    ) -> str:
        """Return the answer to a message, and append both to `messages`; an error or Ctrl-C appends nothing.

        Args:
            message: A text, or messages to append, such as results of tools. `None` answers `messages` as they are.
            max_new_tokens: `None` is the number of the conversation, or else the planned one.
            **options: As for `LoadedModel.chat`, over those of the conversation. There is one answer, so beams are
                refused.

        Raises:
            NotSupportedError: an option brings another cache, or continues the final message.
            QwenVramError: as for `LoadedModel.chat`; the conversation is closed.
        """
        self._generations.turns.refuse_inside("a turn of a conversation cannot start")
        with self._busy:
            asked, prompt = self._prompt(message, max_new_tokens, options)
            job = self._job(prompt, prompt.options, Claim(self._owner, lambda tokens: None))
            job.start()
            answer = self._text(job.result()[0, prompt.inputs["input_ids"].shape[1] :].tolist())
            self._append(asked, answer)
        return answer

    def stream(
        self, message: str | Sequence[Message] | None = None, *, max_new_tokens: int | None = None, **options: Any
    ) -> AnswerStream:
        """Return the answer as `LoadedModel.stream` does; message and answer are appended when the generation ends.

        A generation that is stopped appends what it generated until then. This holds for a stream that is left early,
        for Ctrl-C and for `LoadedModel.stop()`. Other errors append nothing.

        Args:
            message, max_new_tokens, **options: As for `say`.

        Raises:
            QwenVramError: as for `say` and `LoadedModel.stream`.
        """
        self._prompt(message, max_new_tokens, options)

        def make(streamer: BaseStreamer, ended: Callable[[], object]) -> Job[Any]:
            self._generations.turns.refuse_inside("a turn of a conversation cannot start")

            def over() -> None:
                self._busy.release()
                ended()

            self._busy.acquire()
            try:
                asked, prompt = self._prompt(message, max_new_tokens, options)  # after the turn before this one
                own = prompt.options.get("streamer")
                extra = {**prompt.options, "streamer": Tee(own, streamer) if own else streamer}
                claim = Claim(self._owner, lambda tokens: self._append(asked, self._text(tokens)))
                return self._job(prompt, extra, claim, over)
            except BaseException:
                self._busy.release()
                raise

        return AnswerStream(self._prompts.tokenizer, make)

    def close(self) -> None:
        """Free the cache; no more turns are possible, and `messages` stay. A running turn frees it at its end."""
        self._owner.closed = True
        self._generations.kept.drop(only=self._owner)

    def _job(
        self, prompt: Prompt, options: dict[str, Any], claim: Claim, ended: Callable[[], object] | None = None
    ) -> Job[Any]:
        new = prompt.max_new_tokens
        return self._generations.job(self._model, prompt.inputs, new, options, ended, claim)

    def _prompt(
        self, message: str | Sequence[Message] | None, max_new_tokens: int | None, options: dict[str, Any]
    ) -> tuple[list[Message], Prompt]:
        """Return the messages to append, and the prompt of the whole conversation with them."""
        if self._owner.closed:
            raise QwenVramError("this conversation is closed; begin another one with conversation() of the model")
        if not isinstance(self.messages, list):
            raise WorkloadError(
                f"messages of a conversation must be a list, got {type(self.messages).__name__}; assign a list",
                name="messages",
                got=self.messages,
            )
        given: Any = [] if message is None else [{"role": "user", "content": message}]
        if message is not None and not isinstance(message, str):
            if not isinstance(message, Sequence) or not message:
                self._checked(message, None, max_new_tokens, options)  # raises the error of `chat`
            given = list(message)
        return given, self._checked([*self.messages, *given], None, max_new_tokens, options)

    def _checked(
        self, messages: Any, system: str | None, max_new_tokens: int | None, options: dict[str, Any]
    ) -> Prompt:
        model, every = self._model(), {**self._options, **options}
        asked = Asked(model, every)
        if asked.brings_cache():
            raise NotSupportedError(
                "past_key_values and cache_implementation are not supported in a conversation, which keeps the plan's "
                "own cache; use chat() or generate() with a cache",
                knob="past_key_values",
                value=every.get("past_key_values", every.get("cache_implementation")),
            )
        nested = every.get("chat_template_kwargs")
        if {**every, **(nested if isinstance(nested, dict) else {})}.get("continue_final_message"):
            raise NotSupportedError(
                "continue_final_message=True is not supported in a conversation, in which an answer is a new message; "
                "use chat() with the messages",
                knob="continue_final_message",
                value=True,
            )
        new = self._max_new_tokens if max_new_tokens is None else max_new_tokens
        return self._prompts.of_conversation(model, messages, system, new, every, streamed=True)

    def _text(self, tokens: list[int]) -> str:
        return str(self._prompts.tokenizer.decode(tokens, skip_special_tokens=True))

    def _append(self, asked: list[Message], answer: str) -> None:
        self.messages.extend([*asked, {"role": "assistant", "content": answer}])
