"""The bundled Qwen2 model and adapter, and the questions that they were trained on.

Importing it does not import torch. The folder loads like any other checkpoint.

Modules:
    tasks/  Seeded questions that train and test the demo checkpoint and its adapter.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
"""Folder with config, weights, tokenizer and model card."""

ADAPTER: Path = Path(__file__).parent / "adapter"
"""Folder with a LoRA that teaches the checkpoint a sixth category, `qwen_vram.demo.tasks.SKILL`."""
