"""How many sequences run for each prompt, by the generation_config.json of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_vram.arithmetic.catalog import catalog_row
from qwen_vram.arithmetic.model import ModelLike
from qwen_vram.errors import HubError
from qwen_vram.files.hub import hub_generation_config
from qwen_vram.files.local import is_folder

GENERATION_CONFIG = "generation_config.json"


def sequences_per_prompt(model: ModelLike) -> int:
    """The larger of `num_beams` and `num_return_sequences` in the file, which `generate` runs for each prompt.

    1 for a model without such a file, for published models of the catalog, and for values that `generate` refuses.
    """
    path = _path(model)
    try:
        settings = json.loads(path.read_bytes()) if path is not None and path.is_file() else {}
    except (OSError, ValueError):  # `transformers` does not take settings from it either
        settings = {}
    counts = (
        [settings.get(name) for name in ("num_beams", "num_return_sequences")] if isinstance(settings, dict) else []
    )
    return max([1, *(count for count in counts if type(count) is int)])


def _path(model: ModelLike) -> Path | None:
    if not isinstance(model, (str, Path)):
        return None
    if is_folder(Path(model)):
        return Path(model) / GENERATION_CONFIG
    if catalog_row(str(model)) is not None:
        return None
    try:
        return hub_generation_config(str(model))
    except HubError:  # not in the cache, and no network: a load that needs it fails over the weights
        return None
