"""Comparison of the base that an adapter names with the base that it is given."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from qwen_vram.checkpoints.adapters.keys import Adapter

_LOGGER = logging.getLogger(__name__)

# A hub's cache names its folders models--organisation--name/snapshots/commit.
_CACHED = re.compile(r"models--[^/]*?--([^/]+)/snapshots/[^/]+$")
# A quantized copy of a base has the base's tensors: the endings of such copies' names.
_QUANTIZED = re.compile(
    r"(-unsloth)?-(bnb-4bit|bnb-8bit|4bit|8bit|int4|int8|nf4|awq|gptq(-int4|-int8|-4bit|-8bit)?|fp8)$"
)


def warn_of_another_base(adapter: Adapter, base: object) -> None:
    """Log a warning if the adapter was trained on a base of another name than `base`, a folder or hub id.

    Shapes do not show it: a base, its instruction-tuned variant and every fine-tuned copy have the same shapes.
    Quantized copies of a base count as that base.
    """
    trained_on = adapter.settings.trained_on
    if not trained_on or not isinstance(base, (str, Path)) or same_model(trained_on, str(base)):
        return
    _LOGGER.warning(
        "the adapter %r was trained on %r, and the base here is %r: on another model with the same shapes it runs, and "
        "answers wrong; check that the two are the same model",
        str(adapter.folder),
        trained_on,
        str(base),
    )


def same_model(one: str, other: str) -> bool:
    """Tell if two names or folders are of the same model, judged by their last part.

    >>> same_model("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "/models/Qwen2___5-7B-Instruct/")
    True
    >>> same_model("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct")
    False
    """
    return _last_part(one) == _last_part(other)


def _last_part(name: str) -> str:
    path = name.replace("\\", "/").rstrip("/")
    cached = _CACHED.search(path)
    last = cached[1] if cached else path.rpartition("/")[2]
    return _QUANTIZED.sub("", last.replace("___", ".").lower())
