"""`qwen-vram monitor` and `run`: GPU memory over time, with the plans of this library's processes beside it.

Modules:
"""
