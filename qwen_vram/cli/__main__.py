"""Entry point of `python -m qwen_vram.cli`."""

from qwen_vram.cli import main

main()
