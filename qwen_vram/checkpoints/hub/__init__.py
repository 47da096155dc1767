"""Checkpoints on the hub, and errors of the hub as errors of this library.

Modules:
    errors  Conversion of huggingface_hub's exceptions into errors with the next step.
    files   A checkpoint on the hub: config.json, safetensors headers, or all files.
"""
