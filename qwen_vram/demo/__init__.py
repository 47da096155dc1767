"""A small Qwen2 model that ships with the package, and the questions it was trained to answer.

Importing this loads no torch. Load the folder like any other checkpoint.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
"""Folder with config, weights, tokenizer and model card."""

ADAPTER: Path = Path(__file__).parent / "adapter"
"""Folder with a LoRA that teaches the checkpoint a sixth category, `qwen_vram.demo.tasks.SKILL`."""
