"""Choice of the tokenizer for a base with adapters.

It is the base's own, or the one that a trainer saved beside an adapter. Trainers save the tokenizer of the training,
with its chat template and its end token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vram.checkpoints.files.sidecars import matching

_LOGGER = logging.getLogger(__name__)

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# ChatML's end of a turn, with which every chat template of the Qwen family ends an answer.
_END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of a tokenizer.

    Attributes:
        source: The folder of the tokenizer.
        files: Paths by their names in the model's folder.
        end_token_ids: The tokens that end an answer by an adapter's tokenizer; empty if the base's tokenizer stays.
    """

    source: Path
    files: Mapping[str, Path]
    end_token_ids: tuple[int, ...] = ()


def tokenizer_files(base: Path, adapters: Sequence[Path], *, rows: int, tables_changed: bool = False) -> TokenizerFiles:
    """Choose the tokenizer for a base with adapters: that of the last adapter with one, or else the base's.

    An adapter's chat template without a vocabulary completes the base's tokenizer if that has no template. An adapter's
    tokenizer without a template is only used if the base's has no template either, or if it has new tokens.

    Args:
        rows: Rows of the token embeddings; a tokenizer with higher token ids is not used.
        tables_changed: The adapters change embeddings or head, so new tokens are known to their tokenizer only.
    """
    own = matching(base, _FILES)
    for folder in reversed(adapters):
        files = matching(folder, _FILES)
        if tables_changed and _CONFIG in files:
            templates = {name: own[name] for name in _TEMPLATES if name in own and not _has_template(files)}
            return TokenizerFiles(folder, {**templates, **files}, _end_token_ids(files))
        size = _size(files)
        if size is not None and _CONFIG in files:
            if _has_template(own) and not _has_template(files):
                continue
            if size <= rows:
                return TokenizerFiles(folder, files, _end_token_ids(files))
            _LOGGER.warning(
                "the tokenizer in %r has token ids up to %d, and the table of tokens has %d rows; the base's tokenizer "
                "is taken in its place",
                str(folder),
                size - 1,
                rows,
            )
        elif _has_template(files) and not _has_template(own):
            both = {**own, **files}
            return TokenizerFiles(folder, both, _end_token_ids(both))
        elif _has_template(files):
            _LOGGER.warning(
                "the chat template in %r is left out: there is no vocabulary beside it, and the base's tokenizer has a "
                "template of its own; to use the adapter's, copy it into the model's folder",
                str(folder),
            )
    return TokenizerFiles(base, own)


def with_end_tokens(ids: object, more: Sequence[int]) -> int | list[int] | None:
    """Return the `eos_token_id` of a config (a number, a list or `None`) with `more` tokens, new ones first."""
    known = [ids] if isinstance(ids, int) else list(ids) if isinstance(ids, (list, tuple)) else []
    found = [*(token for token in more if token not in known), *known]
    return found if len(found) > 1 else next(iter(found), None)


def read_object(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing or broken."""
    try:
        data = json.loads(files[name].read_bytes())
    except (KeyError, OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _has_template(files: Mapping[str, Path]) -> bool:
    return any(name in files for name in _TEMPLATES) or bool(read_object(files, _CONFIG).get("chat_template"))


def _ids(files: Mapping[str, Path]) -> dict[str, int]:
    """Return the ids of all tokens of the vocabulary; empty if there is no vocabulary that can be read."""
    whole = read_object(files, "tokenizer.json")
    added = read_object(files, "added_tokens.json")
    try:
        vocabulary = whole["model"]["vocab"] if whole else read_object(files, "vocab.json")
        if not vocabulary:
            return {}
        added |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        decoder = read_object(files, _CONFIG).get("added_tokens_decoder", {})
        added |= {token["content"]: int(number) for number, token in decoder.items()}
        return {token: int(number) for token, number in {**vocabulary, **added}.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _size(files: Mapping[str, Path]) -> int | None:
    """Return the highest token id plus 1; `None` if there is no vocabulary that can be read."""
    ids = _ids(files)
    return max(ids.values()) + 1 if ids else None


def _end_token_ids(files: Mapping[str, Path]) -> tuple[int, ...]:
    """Return the ids of the end token in the settings, and of the token that ends a turn in the chat template."""
    settings = {**read_object(files, "special_tokens_map.json"), **read_object(files, _CONFIG)}
    token = settings.get("eos_token")
    named = [token.get("content") if isinstance(token, dict) else token]
    if any(_END_OF_TURN in template for template in _template_texts(files)):
        named.append(_END_OF_TURN)
    ids = _ids(files)
    return tuple(dict.fromkeys(ids[name] for name in named if isinstance(name, str) and name in ids))


def _template_texts(files: Mapping[str, Path]) -> list[str]:
    texts = [str(read_object(files, name).get("chat_template", "")) for name in (_CONFIG, "chat_template.json")]
    if "chat_template.jinja" in files:
        texts.append(files["chat_template.jinja"].read_text(encoding="utf-8", errors="replace"))
    return texts
