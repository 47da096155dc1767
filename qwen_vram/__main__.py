"""Entry point of `python -m qwen_vram`, which is the command `qwen-vram`."""

from qwen_vram.cli import main

main()
