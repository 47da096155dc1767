"""Tests of `qwen_vram/benchmark/`."""
