"""What an adapter is refused with."""

from __future__ import annotations

from qwen_vram.errors import CheckpointError


class AdapterError(CheckpointError):
    """An adapter's files cannot be used, or cannot be merged exactly. `path` is the file or folder at fault."""
