"""The error that refuses an adapter."""

from __future__ import annotations

from qwen_vram.errors import CheckpointError


class AdapterError(CheckpointError):
    """An adapter's files cannot be used with this base. `path` is the file or folder at fault."""
