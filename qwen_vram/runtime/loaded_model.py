"""`LoadedModel`: a model with tokenizer and plan, which generates and reports its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from qwen_vram.checkpoints.running_plans import Publication
from qwen_vram.errors import QwenVramError, WorkloadError
from qwen_vram.planning.planner import Plan
from qwen_vram.runtime.batching.batched import BatchedGenerations
from qwen_vram.runtime.batching.batcher import Batcher
from qwen_vram.runtime.conversations import Conversation
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.generation.answer_stream import AnswerStream, Tee
from qwen_vram.runtime.generation.generations import Generations
from qwen_vram.runtime.generation.token_stream import Token, TokenStream
from qwen_vram.runtime.measure import Report
from qwen_vram.runtime.memory.release import give_back_memory
from qwen_vram.runtime.offload.streamer import Streamer
from qwen_vram.runtime.publication import facts_of
from qwen_vram.runtime.report_times import ReportedTimes
from qwen_vram.runtime.requests.conversation import Message
from qwen_vram.runtime.requests.prompts import Prompt, Prompts
from qwen_vram.runtime.saving.save import SaveReport, save
from qwen_vram.runtime.scheduling.job import Job
from qwen_vram.runtime.scheduling.turns import CLOSED
from qwen_vram.runtime.submissions import Pending, Result, Submissions, awaited


class LoadedModel:
    """A plain `transformers` model with the plan that it was loaded by.

    `model, tokenizer = loaded` unpacks it, and `with load(...) as loaded:` frees the memory at the end. `model` works
    in pipelines, with PEFT and with its own `generate`. `generate`, `chat` and `stream` of this class also use the
    plan's cache and chunk size. They refuse a workload that does not fit the plan's budget, before they allocate.

    Threads may share it: one generation runs at a time, and the others wait in the order of their calls. With a plan
    for `concurrency`, their generations run together. Each runs in a separate thread. It uses the caller's current CUDA
    stream, but not autocast and other settings that PyTorch keeps for each thread.

    Attributes:
        model: The `transformers` model.
        tokenizer: Its tokenizer.
        plan: The plan, with the promised memory.
        device: The device of inputs, which is the first of `devices`.
        devices: The devices of its layers, in order.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        measured: Mapping[torch.device, dict[str, int]],
        before: Mapping[torch.device, int],
        folder: Path,
        streamer: Streamer | None = None,
        decoder: Decoder | None = None,
        batcher: Batcher | None = None,
        capture_seconds: float = 0.0,
    ) -> None:
        self._model: PreTrainedModel | None = cast("PreTrainedModel", model)
        self.tokenizer = tokenizer
        self.plan = plan
        self.devices = tuple(measured)
        self.device = self.devices[0]
        self._folder = folder
        self._streamer = streamer
        self._capture_seconds = capture_seconds
        if batcher is None:
            self._generations = Generations(plan, measured, before, decoder)
        else:
            self._generations = BatchedGenerations(plan, measured, before, batcher, tokenizer)
        self._generations.publication = Publication(self, facts_of(plan, measured))
        self._freeing = Lock()
        assert plan.estimate.architecture is not None
        self._prompts = Prompts(tokenizer, plan.estimate.architecture.vocab_size, folder)
        self._submissions = Submissions(lambda: self.model, self._prompts, self._generations)
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
        """Seconds of capturing and compiling decode steps so far; 0 if the plan captures no steps."""
        decoder = self._generations.decoder
        return self._capture_seconds if decoder is None else decoder.seconds

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
        """Stop the running generation at its next token, without waiting. Any thread may call this.

        The generation's caller gets a `GenerationStoppedError`; a stream's reader gets it after the pieces so far.
        Waiting generations are not stopped.
        """
        self._generations.turns.stop("was stopped by stop()")

    def close(self) -> None:
        """Free the memory; further calls change nothing. Any thread may call this.

        It stops a running generation at its next token, as `stop()`, and refuses those that wait.

        Raises:
            QwenVramError: it is called inside a generation of this model, whose end it would wait for.
        """
        self._generations.turns.close()
        with self._freeing:
            self._model = None
            if self._streamer is not None:
                self._streamer.close()
            self._generations.close()
            if self._generations.publication is not None:
                self._generations.publication.remove()
            give_back_memory()

    def chat(
        self,
        message: str | Sequence[Message],
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Return the answer to a question, or to a conversation of `{"role": ..., "content": ...}` messages.

        Several answers (`num_return_sequences`) are returned as a list. An answer ends at the token that ends a turn in
        the chat template, also if the model's files name another end token.

        Args:
            message: A text, or messages. The content of a message is a text or a list of parts (`{"type": "text",
                "text": ...}`); it may be absent beside `tool_calls`.
            max_new_tokens: `None` is the planned number.
            **options: Arguments of the chat template (`tools`, `enable_thinking`, `chat_template`, ..., or a dict of
                them as `chat_template_kwargs`), and of `transformers`' `generate` (`temperature`, `stop_strings`, ...).
                `seed` makes sampling reproducible. `temperature=0` is greedy; other options of sampling imply
                `do_sample=True`.

        Raises:
            DoesNotFitError: the conversation is longer than planned, and does not fit the budget.
            WorkloadError: it does not fit the model's positions, the template refuses it, or an option is out of range.
            UnknownNameError: neither the template nor `generate` accepts an option.
            CheckpointError: the template is missing or broken, or the tokenizer has tokens that the model lacks.
            ConfigError: a setting of generation_config.json cannot be run.
            NotFiniteError: the logits are NaN or infinite.
            NotSupportedError: an option needs memory that no plan counts.
            GenerationStoppedError: `stop()` or `close()` was called during the generation.
        """
        prompt = self._prompts.of_conversation(self.model, message, system, max_new_tokens, options)
        answers = self._answers(prompt)
        return answers if prompt.answers > 1 else answers[0]

    def generate(
        self, prompt: str | Sequence[str], *, max_new_tokens: int | None = None, **options: Any
    ) -> str | list[str]:
        """Return the text that continues a prompt, or a list of prompts as one batch, without the prompt itself.

        Several answers to a prompt are returned as a list. Those to several prompts are in one list, in order.

        Raises:
            QwenVramError: as for `chat`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
        made = self._prompts.of_texts(self.model, prompts, max_new_tokens, options)
        answers = self._answers(made)
        return answers if made.answers > 1 or not isinstance(prompt, str) else answers[0]

    def stream(
        self,
        message: str | Sequence[Message],
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Return the answer to a question or a conversation as a stream of pieces while it is generated.

        The first read starts the generation, which continues without further reads. It stops if the loop is left early,
        if the stream is dropped, or by its `close()`, which any thread may call. A `streamer` among the options gets
        the tokens too. Beams and several answers are refused.

        Raises:
            DoesNotFitError: as for `chat`, before the first piece.
            GenerationStoppedError, NotFiniteError: as for `chat`, after the last generated piece.
            QwenVramError: as for `chat`, immediately.
        """
        prompt = self._prompts.of_conversation(self.model, message, system, max_new_tokens, options, streamed=True)
        own = prompt.options.get("streamer")

        def make(streamer: BaseStreamer, ended: Callable[[], object]) -> Job[torch.Tensor]:
            extra = {**prompt.options, "streamer": Tee(own, streamer) if own else streamer}
            return self._generations.job(lambda: self.model, prompt.inputs, prompt.max_new_tokens, extra, ended)

        return AnswerStream(self.tokenizer, make)

    def tokens(
        self,
        message: str | Sequence[Message] | None = None,
        *,
        prompt: str | None = None,
        system: str | None = None,
        max_new_tokens: int | None = None,
        logprobs: int | None = None,
        until: Callable[[Token], bool] | None = None,
        **options: Any,
    ) -> TokenStream:
        """Check a request completely, and return its answer as a stream of tokens, which the first read starts.

        Nothing runs and nothing waits before the first read. The stream has the number of tokens of the prompt.

        Args:
            message: As for `chat`; or else `prompt`, as for `generate`.
            logprobs: Give each token its log probability and this number of alternatives.
            until: Called with each token in the generation's thread; the answer ends when it returns true.

        Raises:
            WorkloadError: neither `message` nor `prompt` is given, or both are.
            QwenVramError: as for `chat`, `DoesNotFitError` included, before this returns.
        """
        if (message is None) == (prompt is None):
            raise WorkloadError("pass either a message or a prompt", name="prompt", got=prompt)
        if message is not None:
            made = self._prompts.of_conversation(self.model, message, system, max_new_tokens, options, streamed=True)
        else:
            made = self._prompts.of_texts(self.model, [str(prompt)], max_new_tokens, options, streamed=True)
        return TokenStream(self._generations, lambda: self.model, made, logprobs=logprobs, until=until)

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
        """Check a request completely, queue it, and return a future of its answer.

        With a plan for `concurrency`, requests run together; otherwise one after the other. The future is one of
        `concurrent.futures`. Its `cancel()` also stops a request that runs.

        Args:
            message: As for `chat`; or else `prompt`, as for `generate`.
            timeout: Seconds after which the request is stopped, and its future has a `GenerationStoppedError`.

        Raises:
            QueueFullError: `max_waiting` submitted requests are not complete.
            QwenVramError: as for `chat`, before this returns.
        """
        return self._submissions.submit(
            message, prompt=prompt, system=system, max_new_tokens=max_new_tokens, timeout=timeout, **options
        )

    async def agenerate(
        self, message: str | Sequence[Message] | None = None, *, prompt: str | None = None, **options: Any
    ) -> str | list[str]:
        """Return the answer to a coroutine. Arguments and errors are those of `submit`.

        If the coroutine is cancelled, the request is too.
        """
        return await awaited(self.submit(message, prompt=prompt, **options))

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> Iterator[Result]:
        """Yield the results of many prompts as they finish, in any order; an error of one spoils no other.

        Prompts are taken from the iterable as places become free. Leaving the loop cancels the others.

        Args:
            prompts: Texts as for `generate`, and conversations as for `chat`.
            max_new_tokens, timeout, **options: As for `submit`, for each prompt.
        """
        return self._submissions.results(
            prompts, max_new_tokens=max_new_tokens, timeout=timeout, ahead=self.plan.concurrency, options=options
        )

    @property
    def max_waiting(self) -> int:
        """The most submitted requests that are not complete; it can be set."""
        return self._submissions.most

    @max_waiting.setter
    def max_waiting(self, most: int) -> None:
        self._submissions.most = most

    def conversation(
        self, *, system: str | None = None, max_new_tokens: int | None = None, **options: Any
    ) -> Conversation:
        """Return an empty conversation, which keeps its cache: a turn feeds only what is new.

        Args:
            system: The system message.
            max_new_tokens, **options: As for `chat`, for every turn that does not set them itself.

        Raises:
            NotSupportedError: an option brings another cache.
            QwenVramError: as for `chat`, except `DoesNotFitError`.
        """
        made = self._generations
        return Conversation(
            lambda: self.model, self._prompts, made, system=system, max_new_tokens=max_new_tokens, options=options
        )

    def new_cache(self, *, max_length: int) -> Cache:
        """Return a preallocated cache of `max_length` tokens for `generate(past_key_values=...)`, on the plan's device.

        If decode steps are captured, the cache uses the memory that the plan counts, if that is long enough, until it
        is freed. Other generations meanwhile take additional memory. The cache of a conversation is freed.

        Raises:
            WorkloadError: `max_length` is not a positive number.
            QwenVramError: the model is closed.
        """
        assert self.model is not None
        return self._generations.new_cache(max_length=max_length)

    def report(self) -> Report:
        """Return predicted and measured memory, part by part: the load, and the last generation with its times."""
        made = self._generations
        return Report.of(made.prediction(), made.measured, ReportedTimes.of(self.plan, made.timed))

    def save_quantized(
        self,
        out: str | Path,
        *,
        max_shard_size: str | int = "4GB",
        overwrite: bool = False,
        progress: bool = True,
    ) -> SaveReport:
        """Write the quantized weights: a checkpoint that loads without the 16-bit file, bit for bit.

        `load()` loads it without a knob, and `transformers` with `from_pretrained`. It includes embeddings on the host.
        One tensor at a time is copied through the host. The output appears at `out` only when it is complete. Saving
        takes a turn like a generation, and `stop()` does not stop it.

        Args:
            out: A new folder.
            max_shard_size: The most tensor data in one file, except for a single larger module.
            overwrite: Replace a checkpoint at `out`; it stays there until the new one is complete.
            progress: Show a bar on standard error.

        Raises:
            NotSupportedError: the weights are not quantized, their backend cannot save, or an adapter is on the model.
            CheckpointError: `out` exists or contains the source, or its disk is too full or fails.
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
        streamer: BaseStreamer | None = None,
    ) -> Report:
        """Generate from random tokens to the last planned one, and compare the memory with the prediction.

        Args:
            prompt_len, max_new_tokens, batch_size: `None` is the planned number.
            steps: Stop after this many tokens, with a cache that holds all of them.
            streamer: A streamer of `transformers`, which gets the tokens.

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
        alone = {"num_beams": 1, "num_return_sequences": 1, "stop_strings": None}  # over the model's files
        options = {**alone, "do_sample": False, "min_new_tokens": steps, "stopping_criteria": stop}
        if streamer is not None:
            options["streamer"] = streamer
        self._generate(inputs, new, options)
        return self.report()

    def _answers(self, prompt: Prompt) -> list[str]:
        produced = self._generate(prompt.inputs, prompt.max_new_tokens, prompt.options)
        new = produced[:, prompt.inputs["input_ids"].shape[1] :]
        return cast("list[str]", self.tokenizer.batch_decode(new, skip_special_tokens=True))

    def _generate(
        self, inputs: Mapping[str, torch.Tensor], max_new_tokens: int | None, options: Mapping[str, Any]
    ) -> torch.Tensor:
        job = self._generations.job(lambda: self.model, inputs, max_new_tokens, options)
        job.start()
        return job.result()
