"""Prompts: a checked request, as tokens and options for `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qwen_vram.checkpoints.adapters.folder import AdapterChoice
from qwen_vram.checkpoints.adapters.keys import open_adapter
from qwen_vram.checkpoints.files.local import is_folder
from qwen_vram.checkpoints.hub.files import hub_companions
from qwen_vram.checkpoints.resolve import ModelLike, own_adapter, resolve
from qwen_vram.errors import WorkloadError
from qwen_vram.runtime.peft_adapter import open_adapters_tokenizer
from qwen_vram.runtime.requests.conversation import Message, messages_of, rendered
from qwen_vram.runtime.requests.options import sorted_options
from qwen_vram.runtime.requests.sampling import Settings, generation_config
from qwen_vram.runtime.requests.template import chosen_template, end_of_turn
from qwen_vram.runtime.requests.vocabulary import check_tokens, check_vocabulary, padded_batch
from qwen_vram.runtime.tensors.checkpoint import open_tokenizer
from qwen_vram.spec.catalog import catalog_row


class Prompt(NamedTuple):
    """The arguments of one call of `generate`.

    Attributes:
        inputs: `input_ids` and `attention_mask`, (prompts, tokens).
        max_new_tokens: `None` is the planned number.
        options: All other options.
        answers: The number of answers for each prompt.
    """

    inputs: dict[str, Tensor]
    max_new_tokens: int | None
    options: dict[str, Any]
    answers: int


class Prompts:
    """Maker of prompts for one model.

    Args:
        table: Rows of the model's token embeddings.
        folder: Its checkpoint, for errors.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: int, folder: Path) -> None:
        self.tokenizer = tokenizer
        self.table = table
        self.folder = folder

    def of_conversation(
        self,
        model: Any,
        message: str | Sequence[Message],
        system: str | None,
        max_new_tokens: int | None,
        options: Mapping[str, Any],
        *,
        streamed: bool = False,
        file: GenerationConfig | None = None,
    ) -> Prompt:
        """Return the prompt of a question or a conversation, through the chat template.

        Args:
            model: `None` if it is not loaded yet; `file` is then its `generation_config`.
            streamed: The answer is read while it is generated.

        Raises:
            WorkloadError, UnknownNameError, CheckpointError, ConfigError: as for `LoadedModel.chat`.
        """
        nested = options.get("chat_template_kwargs")
        named = {**options, **nested} if isinstance(nested, Mapping) else options
        template = chosen_template(self.tokenizer, named, self.folder)
        for_template, for_generate = sorted_options(options, model, template)
        settings = Settings(for_generate, model.generation_config if file is None else file)
        if streamed:
            settings.check_stream()
        messages = messages_of(message, system, template)
        inputs = rendered(self.tokenizer, messages, template, for_template, self.folder)
        return self._checked(inputs, settings, max_new_tokens, end_of_turn(self.tokenizer, template))

    def of_texts(
        self,
        model: Any,
        prompts: Sequence[str],
        max_new_tokens: int | None,
        options: Mapping[str, Any],
        *,
        streamed: bool = False,
    ) -> Prompt:
        """Return the prompt of texts without a template, as one batch with padding at the front.

        Args:
            streamed: As for `of_conversation`.

        Raises:
            WorkloadError, UnknownNameError, CheckpointError, ConfigError: as for `LoadedModel.generate`.
        """
        if not prompts or not all(isinstance(text, str) and text for text in prompts):
            raise WorkloadError("prompt must be a text, or a list of texts, none empty", name="prompt", got=prompts)
        _, for_generate = sorted_options(options, model, None)
        settings = Settings(for_generate, model.generation_config)
        if streamed:
            settings.check_stream()
        inputs = padded_batch(self.tokenizer, prompts, self.table)
        return self._checked(inputs, settings, max_new_tokens, None)

    def _checked(
        self, inputs: dict[str, Tensor], settings: Settings, max_new_tokens: int | None, end: int | None
    ) -> Prompt:
        check_vocabulary(self.tokenizer, self.table, self.folder, used=True)
        check_tokens(inputs["input_ids"], self.tokenizer, self.table, self.folder)
        options = settings.settled(self.tokenizer, self.table, end_of_turn=end)
        return Prompt(inputs, settings.max_new_tokens(max_new_tokens), options, settings.answers)


def check_chat(model: ModelLike, adapter: AdapterChoice, system: str | None, options: Mapping[str, Any]) -> None:
    """Refuse a model that cannot chat with these options, before its weights are downloaded or read.

    Args:
        adapter: Folder or hub id of an adapter, which may bring a tokenizer and a chat template.

    Raises:
        AdapterError: the adapter cannot be used.
        WorkloadError, UnknownNameError, CheckpointError, ConfigError: as for `LoadedModel.stream`.
        HubError: the hub does not give the tokenizer.
    """
    adapter = own_adapter(model, adapter)
    architecture = resolve(model, adapter).architecture
    if not isinstance(model, (str, Path)):
        return
    folder = Path(model)
    if not is_folder(folder):
        row = catalog_row(str(model))
        folder = hub_companions(row.repo_id if row else str(model))
    file, rows = generation_config(folder), architecture.vocab_size
    adapters = [] if adapter is None or adapter is False else [open_adapter(adapter).folder]
    _, tokenizer = open_adapters_tokenizer(folder, adapters, rows=rows)
    prompts = Prompts(tokenizer or open_tokenizer(folder), rows, folder)
    prompts.of_conversation(None, "hi", system, None, options, streamed=True, file=file)
