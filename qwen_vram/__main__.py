"""`python -m qwen_vram` is `qwen-vram`."""

from qwen_vram.cli import main

main()
