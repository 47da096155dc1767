"""The files beside the weights: config.json brought up to date, tokenizer, chat template and generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vram.files.companions import companion_files, matching
from qwen_vram.files.local import NAMED_WEIGHTS
from qwen_vram.lora.adapter import Adapter
from qwen_vram.lora.tables import TABLES
from qwen_vram.lora.targets import Targets

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "*.jinja",
)  # fmt: skip


def carried_files(base: Path, adapters: Sequence[Adapter], targets: Targets) -> dict[str, Path]:
    """Files to copy, by their name in the output.

    The tokenizer is the base's, or the last adapter's that has one where the adapters changed a table of tokens: new
    tokens are known to that one only.
    """
    files = companion_files(base)
    source = tokenizer_source(base, adapters, targets)
    if source != base:
        for name in matching(base, _TOKENIZER):
            files.pop(name, None)
        files |= matching(source, _TOKENIZER)
    return files


def tokenizer_source(base: Path, adapters: Sequence[Adapter], targets: Targets) -> Path:
    """The folder that the tokenizer comes from."""
    tables_changed = any(target.updates and target.name.removesuffix(".weight") in TABLES for target in targets.targets)
    for adapter in reversed(adapters if tables_changed else ()):
        if (adapter.folder / "tokenizer_config.json").is_file():
            return adapter.folder
    return base


def merged_config(base: Mapping[str, object], targets: Targets, quantization_config: Mapping[str, Any] | None) -> str:
    """The text of the output's config.json: the base's, with what the merge changed."""
    config = {key: value for key, value in base.items() if key != NAMED_WEIGHTS}
    config["vocab_size"] = targets.vocab_size
    config["tie_word_embeddings"] = targets.tie_word_embeddings
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
