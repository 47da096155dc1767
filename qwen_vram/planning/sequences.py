"""Number of sequences per prompt, by a checkpoint's generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping

from qwen_vram.checkpoints.resolve import Resolved
from qwen_vram.errors import HubError
from qwen_vram.spec.catalog import catalog_row


def sequences_per_prompt(found: Resolved) -> int:
    """Return the larger of `num_beams` and `num_return_sequences` in the file: `generate`'s sequences for a prompt.

    It is 1 for a model without such a file, for published models of the catalog, and for values that `generate`
    refuses.
    """
    settings = found.files.generation if found.files is not None else _of_repository(found.repo_id)
    counts = [settings.get(name) for name in ("num_beams", "num_return_sequences")]
    return max([1, *(count for count in counts if type(count) is int)])


def _of_repository(repo_id: str) -> Mapping[str, object]:
    """Return the settings in a repository's file; empty for models of the catalog, and for an invalid file."""
    if not repo_id or catalog_row(repo_id) is not None:
        return {}
    from qwen_vram.checkpoints.hub.files import hub_generation_config

    try:
        path = hub_generation_config(repo_id)
    except HubError:  # not in the cache, and no network: a load that needs it fails over the weights
        return {}
    try:
        settings = json.loads(path.read_bytes()) if path is not None and path.is_file() else {}
    except (OSError, ValueError):  # `transformers` does not take settings from it either
        return {}
    return settings if isinstance(settings, dict) else {}
