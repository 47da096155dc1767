"""Files beside the merged weights: config.json, tokenizer and generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vram.checkpoints.adapters.tables import TABLES
from qwen_vram.checkpoints.adapters.tokenizer import TokenizerFiles, read_object, tokenizer_files, with_end_tokens
from qwen_vram.checkpoints.checkpoint import CheckpointFiles
from qwen_vram.checkpoints.files.names import CONFIG, NAMED_WEIGHTS
from qwen_vram.checkpoints.files.sidecars import companion_files, copy_files
from qwen_vram.lora.targets import Targets
from qwen_vram.lora.weighted import WeightedAdapter
from qwen_vram.runtime.peft_adapter import open_adapters_tokenizer

_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """The files that are written beside the weights.

    Attributes:
        copied: Files to copy, by their name in the output.
        texts: Texts to write, by the name of their file: config.json, and generation_config.json if it changes.
        tokenizer: The folder of the tokenizer.
    """

    copied: dict[str, Path]
    texts: dict[str, str]
    tokenizer: Path

    def write(self, folder: Path, *, config: bool) -> None:
        """Write the files into `folder`; write config.json only if `config` is true."""
        copy_files(self.copied, folder)
        for name, text in self.texts.items():
            if config or name != CONFIG:
                (folder / name).write_text(text, encoding="utf-8")


def companions(
    files: CheckpointFiles,
    adapters: Sequence[WeightedAdapter],
    targets: Targets,
    quantization_config: Mapping[str, Any] | None,
) -> Companions:
    """Choose the files beside the weights.

    The tokenizer is that of the last adapter with one, or the base's. The end token of an adapter's tokenizer is added
    to those that end a generation. They are in generation_config.json, or in config.json if that file is missing.
    """
    base = files.folder
    tables_changed = any(target.updates and target.name.removesuffix(".weight") in TABLES for target in targets.targets)
    folders = [adapter.folder for adapter in adapters]
    if tables_changed:
        chosen = tokenizer_files(base, folders, rows=targets.vocab_size, tables_changed=True)
    else:
        chosen, _ = open_adapters_tokenizer(base, folders, rows=targets.vocab_size)
    copied = companion_files(base)
    for name in tokenizer_files(base, (), rows=targets.vocab_size).files:
        copied.pop(name, None)
    copied |= chosen.files
    config = {key: value for key, value in files.config.items() if key != NAMED_WEIGHTS}
    config["vocab_size"] = targets.vocab_size
    config["tie_word_embeddings"] = targets.tie_word_embeddings
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    texts = _with_end(copied, config, chosen)
    return Companions(copied=copied, texts=texts, tokenizer=chosen.source)


def _with_end(copied: dict[str, Path], config: dict[str, Any], chosen: TokenizerFiles) -> dict[str, str]:
    """Return the texts of config.json and, if an adapter's end token is new in it, of generation_config.json."""
    texts = {}
    if chosen.end_token_ids:
        generation = read_object(copied, _GENERATION)
        settings = generation or config
        ids = with_end_tokens(settings.get("eos_token_id"), chosen.end_token_ids)
        if ids != settings.get("eos_token_id"):
            settings["eos_token_id"] = ids
            if generation:
                del copied[_GENERATION]
                texts[_GENERATION] = _text(generation)
    return {CONFIG: _text(config), **texts}


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
