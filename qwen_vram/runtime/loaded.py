"""LoadedModel: a model, its tokenizer and its plan; it answers, and reports what it took beside what was promised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, cast

import torch
from transformers import (
    Cache,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from qwen_vram.errors import CheckpointError, QwenVramError, WorkloadError
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.answer_stream import AnswerStream, Tee
from qwen_vram.runtime.decoder import Decoder
from qwen_vram.runtime.generations import Generations
from qwen_vram.runtime.job import Job
from qwen_vram.runtime.measure import Report
from qwen_vram.runtime.memory import give_back_memory
from qwen_vram.runtime.save import SaveReport, save
from qwen_vram.runtime.streaming import Streamer
from qwen_vram.runtime.turns import CLOSED

Message = Mapping[str, str]


class LoadedModel:
    """A plain `transformers` model with the plan that it was loaded by.

    `model, tokenizer = loaded` unpacks, and `with load(...) as loaded:` gives the memory back at the end. `model` works
    in pipelines, with PEFT and with its own `generate`; `generate`, `chat` and `stream` here also obey the plan's cache
    and chunk size, and refuse, before anything is allocated, a workload that would not fit the plan's budget.

    Threads may share it: one generation runs at a time, the others wait in the order in which they were asked for. Each
    runs in a thread of its own; autocast and other settings that PyTorch keeps for each thread do not reach it, except
    for the current CUDA stream.

    Attributes:
        model: The `transformers` model.
        tokenizer: Its tokenizer.
        plan: What was promised.
        device: Where inputs go: the first of `devices`.
        devices: Where its layers are, in order.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        measured: Mapping[torch.device, dict[str, int]],
        folder: Path,
        streamer: Streamer | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._model: PreTrainedModel | None = cast("PreTrainedModel", model)
        self.tokenizer = tokenizer
        self.plan = plan
        self.devices = tuple(measured)
        self.device = self.devices[0]
        self._folder = folder
        self._streamer = streamer
        self._generations = Generations(plan, measured, decoder)
        self._freeing = Lock()
        if plan.profile.prefill_chunk_size is not None:
            self.model.generation_config.prefill_chunk_size = plan.profile.prefill_chunk_size
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def model(self) -> PreTrainedModel:
        """The `transformers` model.

        Raises:
            QwenVramError: after `close()`.
        """
        if self._model is None:
            raise QwenVramError(CLOSED)
        return self._model

    @property
    def compile_seconds(self) -> float:
        """What compiling and capturing decode steps took so far; 0 where `compiled` is not asked for."""
        decoder = self._generations.decoder
        return 0.0 if decoder is None else decoder.seconds

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._model is None else f"on {', '.join(map(str, self.devices))}"
        return f"<LoadedModel {self.plan.estimate.model}, {self.plan.profile.weights} weights, {state}>"

    def stop(self) -> None:
        """Stop the generation that runs now, with its next token; any thread may call this, and it does not wait.

        The generation's caller gets a `GenerationStoppedError`; a stream's reader gets it after the pieces so far.
        Generations that wait for their turn are not stopped.
        """
        self._generations.turns.stop("was stopped by stop()")

    def close(self) -> None:
        """Give the memory back; calling it again changes nothing. Any thread may call this.

        A generation that runs is stopped with its next token, as by `stop()`, and those that wait are refused.

        Raises:
            QwenVramError: it is called inside a generation of this model, for whose end it would wait.
        """
        self._generations.turns.close()
        with self._freeing:
            self._model = None
            if self._streamer is not None:
                self._streamer.close()
            if self._generations.decoder is not None:
                self._generations.decoder.close()
            give_back_memory()

    def chat(
        self,
        message: str | Sequence[Message],
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """The answer to a question, or to a conversation of `{"role": ..., "content": ...}` messages.

        Args:
            max_new_tokens: `None` is what was planned for.
            **options: Passed to `transformers`' `generate`, such as `do_sample=False`.

        Raises:
            DoesNotFitError: the conversation is longer than planned, and does not fit the budget.
            WorkloadError: it does not fit the model's positions.
            NotSupportedError: an option takes memory that no plan counts.
            GenerationStoppedError: `stop()` or `close()` was called in the meantime.
        """
        inputs = self._conversation(message, system)
        return self._answer(inputs, max_new_tokens, options)[0]

    def generate(
        self, prompt: str | Sequence[str], *, max_new_tokens: int | None = None, **options: Any
    ) -> str | list[str]:
        """The text that continues a prompt, or a list of them as one batch; without the prompt itself.

        Raises:
            DoesNotFitError, WorkloadError, NotSupportedError, GenerationStoppedError: as for `chat`.
        """
        single = isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
        if not prompts or not all(isinstance(text, str) and text for text in prompts):
            raise WorkloadError("prompt must be a text, or a list of texts, none empty", name="prompt", got=prompt)
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        answers = self._answer(dict(inputs), max_new_tokens, options)
        return answers[0] if single else answers

    def stream(
        self,
        message: str | Sequence[Message],
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> AnswerStream:
        """The answer to a question or a conversation, piece by piece as it is made.

        The first piece that is read starts the generation. It goes on by itself, whether more is read or not: leaving
        the loop early, dropping the stream, or its `close()`, which any thread may call, stops it.

        Raises:
            DoesNotFitError, WorkloadError, NotSupportedError: as for `chat`, before the first piece.
            GenerationStoppedError: as for `chat`, after the last piece that was made.
        """
        inputs = self._conversation(message, system)

        def make(streamer: BaseStreamer, ended: Callable[[], object]) -> Job[torch.Tensor]:
            both = Tee(options["streamer"], streamer) if options.get("streamer") else streamer
            extra = {**options, "streamer": both}
            return self._generations.job(lambda: self.model, inputs, max_new_tokens, extra, ended)

        return AnswerStream(self.tokenizer, make)

    def new_cache(self, *, max_length: int) -> Cache:
        """A preallocated cache of `max_length` tokens, where the plan has it, for `generate(past_key_values=...)`.

        Where decode steps are compiled, it has the memory that the plan counts for as long as it lives, if that is
        long enough; whatever else is generated meanwhile takes memory of its own.

        Raises:
            WorkloadError: `max_length` is no positive number.
            QwenVramError: the model is closed.
        """
        assert self.model is not None
        return self._generations.new_cache(max_length=max_length)

    def report(self) -> Report:
        """Predicted beside measured, part by part: the load, and the last generation where there was one."""
        return Report.of(self._generations.prediction(), self._generations.measured)

    def save_quantized(
        self,
        out: str | Path,
        *,
        max_shard_size: str | int = "4GB",
        overwrite: bool = False,
        progress: bool = True,
    ) -> SaveReport:
        """Write the quantized weights as they are: a checkpoint that loads without the 16-bit file, bit for bit.

        `load()` takes it with no knob, `transformers` with `from_pretrained`. A table on the host is in it too. One
        tensor at a time passes through the host. Nothing appears at `out` before all is there, and then all at once. It
        takes a turn, as a generation does, and cannot be stopped by `stop()`.

        Args:
            out: A new folder.
            max_shard_size: The most tensor data in one file, a single larger module apart.
            overwrite: Replace a checkpoint that is at `out`; it stays there until the new one is complete.
            progress: Show a bar on standard error.

        Raises:
            NotSupportedError: the weights are not quantized, their backend cannot save, or an adapter is on the model.
            CheckpointError: `out` exists, holds what is read, or its disk is too full or fails.
        """
        architecture = self.plan.estimate.architecture
        assert architecture is not None
        return self._generations.turns.run(
            lambda: save(
                self.model,
                architecture,
                self.plan.profile,
                source=self._folder,
                out=Path(out),
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                progress=progress,
            )
        )

    def probe(
        self,
        *,
        prompt_len: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        steps: int | None = None,
    ) -> Report:
        """Generate from random tokens, to the last one, and compare what it took with what was predicted.

        Args:
            prompt_len, max_new_tokens, batch_size: `None` is what was planned for.
            steps: Stop after this many tokens, with a cache that holds all of them.

        Raises:
            DoesNotFitError, WorkloadError: as for `chat`, before anything is allocated.
        """
        planned = self.plan.workload
        workload = replace(
            planned,
            prompt_len=planned.prompt_len if prompt_len is None else prompt_len,
            max_new_tokens=planned.max_new_tokens if max_new_tokens is None else max_new_tokens,
            batch_size=planned.batch_size if batch_size is None else batch_size,
        )
        shape, new = (workload.batch_size, workload.prompt_len), workload.max_new_tokens
        steps = new if steps is None else min(replace(workload, max_new_tokens=steps).max_new_tokens, new)
        tokens = torch.randint(0, self.model.config.vocab_size, shape)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if planned.padded:
            inputs["attention_mask"][0, 0] = 0
        stop = StoppingCriteriaList([MaxLengthCriteria(shape[1] + steps)])
        self._generate(inputs, new, {"do_sample": False, "min_new_tokens": steps, "stopping_criteria": stop})
        return self.report()

    def _conversation(self, message: str | Sequence[Message], system: str | None) -> dict[str, torch.Tensor]:
        asked = [{"role": "user", "content": message}] if isinstance(message, str) else message
        if not isinstance(asked, Sequence) or not asked or not all(_is_message(one) for one in asked):
            raise WorkloadError(
                f'message must be a text, or a list of {{"role": ..., "content": ...}}, got {message!r}',
                name="message",
                got=message,
            )
        messages = [dict(one) for one in asked]
        if system is not None:
            if not isinstance(system, str):
                raise WorkloadError(f"system must be a text, got {system!r}", name="system", got=system)
            messages.insert(0, {"role": "system", "content": system})
        if not self.tokenizer.chat_template:
            raise CheckpointError(
                f"{str(self._folder)!r} has no chat template; use generate() with a prompt of your own, or add the "
                "model's chat_template.jinja",
                path=str(self._folder),
            )
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return dict(cast("Mapping[str, torch.Tensor]", inputs))

    def _answer(
        self, inputs: dict[str, torch.Tensor], max_new_tokens: int | None, options: dict[str, Any]
    ) -> list[str]:
        if not inputs["input_ids"].shape[1]:
            raise CheckpointError(
                f"the tokenizer in {str(self._folder)!r} makes no tokens of the prompt; add the model's tokenizer.json",
                path=str(self._folder),
            )
        produced = self._generate(inputs, max_new_tokens, options)
        new = produced[:, inputs["input_ids"].shape[1] :]
        return cast("list[str]", self.tokenizer.batch_decode(new, skip_special_tokens=True))

    def _generate(
        self, inputs: Mapping[str, torch.Tensor], max_new_tokens: int | None, options: Mapping[str, Any]
    ) -> torch.Tensor:
        job = self._generations.job(lambda: self.model, inputs, max_new_tokens, options)
        job.start()
        return job.result()


def _is_message(one: object) -> bool:
    if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
        return False
    return one.get("content") is not None or "tool_calls" in one
